"""A model made of slices: parts that are constructed when they are first used and are on the GPU while they are."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _requests
from .._errors import InvalidArgumentError
from .._nested import to_device
from .._units import wrapping
from .._units.disk import DiskStore
from .._units.residency import Event
from ._logs import logger_for
from ._manager import SliceManager, Strategy
from ._summary import SlyceSummary, summarize


class SlyceModel(nn.Module):  # type: ignore[misc]
    """A model whose slices take turns on the device.

    ``slices``: tables with ``name``, ``constructor`` and optionally ``config`` (a dict is keyword arguments, a tuple
    or list arguments, anything else the one argument). The first one is active. ``gpu_strategy``: ``"none"`` runs on
    the CPU, ``"active_only"`` keeps the active slice on the GPU, ``"limit_gpu"`` as many as fit into
    ``max_gpu_mem_mb``. ``disk_cache_path``: slices leave host memory for the disk when it is 90 % full or they have
    more than ``max_cpu_mem_mb`` there. ``log_file``: where the log goes (default ``slyce.log`` under
    ``disk_cache_path``), beside the console unless ``log_to_console`` is false. ``device``: the GPU (default: the
    current one, else the CPU). ``prefetch``: what is expected next is brought in the background.

    A slice keeps its state, trained or not, wherever it goes. Inputs are moved to the slice's device, outputs stay
    there.
    """

    def __init__(
        self,
        slices: Iterable[Mapping[str, Any]],
        gpu_strategy: Strategy = "none",
        max_gpu_mem_mb: float | None = None,
        disk_cache_path: str | os.PathLike[str] | None = None,
        *,
        max_cpu_mem_mb: float | None = None,
        device: Any = None,
        prefetch: bool = True,
        log_file: str | os.PathLike[str] | None = None,
        log_to_console: bool = True,
        log_level: int | str = logging.INFO,
    ) -> None:
        super().__init__()
        disk = None if disk_cache_path is None else DiskStore(disk_cache_path)
        if log_file is None and disk_cache_path is not None:
            log_file = Path(disk_cache_path) / "slyce.log"
        self.log = logger_for(self, log_file, log_to_console, log_level)
        self.manager = SliceManager(
            gpu_strategy,
            max_gpu_mem_mb=max_gpu_mem_mb,
            max_cpu_mem_mb=max_cpu_mem_mb,
            disk=disk,
            device=device,
            prefetch=prefetch,
            log=self.log,
        )
        self.slices = nn.ModuleDict()
        """Slices that were made."""
        self._making = threading.RLock()
        for each in slices:
            self._register(each)
        if not self.manager.slices:
            raise InvalidArgumentError("a SlyceModel needs at least one slice")
        self._active = next(iter(self.manager.slices))

    def _register(self, described: Mapping[str, Any]) -> None:
        unknown = set(described) - {"name", "constructor", "config"}
        if unknown or not {"name", "constructor"} <= set(described):
            raise InvalidArgumentError(
                f"a slice is described by name, constructor and config, not by {', '.join(map(str, described))}"
            )
        self.manager.register(described["name"], described["constructor"], described.get("config"))

    # --- running --------------------------------------------------------------------------------------------

    @property
    def active_slice(self) -> str:
        """The slice that `forward` runs."""
        return self._active

    @property
    def slice_names(self) -> list[str]:
        """All slices, made or not, in order."""
        return list(self.manager.slices)

    def set_active_slice(self, name: str) -> None:
        """From now on `forward` runs this slice; it is made and brought now."""
        self.slice(name)
        self._device_of(name)
        self.manager.load(name)
        if name != self._active:
            self.log.info("slice %s is active (was %s)", name, self._active)
        self._active = name

    def forward(self, *inputs: Any, active_slice: str | None = None, **named: Any) -> Any:
        """Runs the active slice, or makes another one active first. Arguments are the slice's own."""
        if active_slice is not None and active_slice != self._active:
            self.manager.slice(active_slice)
            self.log.info("slice %s is active (was %s)", active_slice, self._active)
            self._active = active_slice
        return self.run_slice(self._active, *inputs, **named)

    def run_slice(self, name: str, *inputs: Any, **named: Any) -> Any:
        """Runs a slice without making it the active one; several threads may run several slices."""
        module = self.slice(name)
        moved, moved_named = to_device((inputs, named), self._device_of(name))
        return module(*moved, **moved_named)

    def run_pipeline(self, value: Any, names: Sequence[str] | None = None) -> Any:
        """Runs slices one after another (default: all), each on the output of the one before; a tuple is several
        arguments.

        While one runs the next one is brought.
        """
        order = self.slice_names if names is None else list(names)
        self.manager.schedule(order)
        for name in order:
            value = self.run_slice(name, *value) if isinstance(value, tuple) else self.run_slice(name, value)
        return value

    def schedule(self, names: Sequence[str]) -> None:
        """Slices will be used in this order: each brings the next one in the background."""
        self.manager.schedule(names)

    def preload(self, name: str) -> Future[bool]:
        """Begins to make and bring a slice in the background, if there is room; the result says whether it came."""

        def bring() -> bool:
            self.slice(name)
            return self.manager.prefetch(self.manager.slice(name).unit).result()  # type: ignore[arg-type]

        return self.manager.in_background(bring, alone=True)

    def _device_of(self, name: str) -> Any:
        """Where a slice that was made runs: one that is larger than the limit, on the CPU."""
        unit = self.manager.slice(name).unit
        if unit is None or unit.device.type == "cpu" or self.manager.fits(unit):
            return torch.device("cpu") if unit is None else unit.device
        self.log.warning(
            "slice %s has %d bytes, more than max_gpu_mem_mb allows (%s): it runs on the CPU",
            *(name, unit.device_bytes, self.manager.budget),
        )
        with unit.lock:
            unit.device = torch.device("cpu")
        return unit.device

    # --- slices ---------------------------------------------------------------------------------------------

    def slice(self, name: str) -> nn.Module:
        """The module of a slice; makes it if need be."""
        with self._making:
            found = self.manager.slice(name)
            # Offloading may have made it already.
            if found.module is None or name not in self.slices:
                made: Any = self.manager.made(name).module
                made.train(self.training)
                self.slices[name] = made
            module: nn.Module = found.module
            return module

    def construct_all(self) -> SlyceModel:
        """Makes every slice, so that `parameters` has all of them."""
        for name in self.slice_names:
            self.slice(name)
        return self

    def offload_slice(self, name: str | None = None, non_blocking: bool = False) -> Future[None] | None:
        """A slice (default: the active one) goes one tier down: GPU, host memory, disk."""
        wanted = self._active if name is None else name
        self.slice(wanted)
        return self.manager.offload_slice(wanted, non_blocking)

    def reset_slice(self, name: str) -> None:
        """The slice is as its constructor makes it, the next time it is used."""
        with self._making:
            self.manager.erase(name)
            if name in self.slices:
                del self.slices[name]

    def erase_slice(self, name: str) -> None:
        """The slice is no part of the model any more."""
        if len(self.manager.slices) == 1:
            raise InvalidArgumentError(f"slice {name!r} is the only one; a SlyceModel needs at least one")
        self.reset_slice(name)
        del self.manager.slices[name]
        if self._active == name:
            self._active = next(iter(self.manager.slices))

    def requires_grad_(self, requires_grad: bool = True) -> SlyceModel:
        """Whether the parameters of all slices need gradients, also of those that are made later."""
        self._list_what_was_made()
        super().requires_grad_(requires_grad)
        self.manager.trainable = requires_grad
        return self

    def _list_what_was_made(self) -> None:
        """Slices that something else has made, such as offloading, are in `slices`, too."""
        for name, found in self.manager.slices.items():
            if found.module is not None:
                self.slice(name)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> SlyceModel:
        self._list_what_was_made()
        super()._apply(fn, recurse)
        fn = _requests.plain(fn)
        conversions = self.manager.conversions
        if conversions and _only_sends(conversions[-1]) and _only_sends(fn):
            conversions.pop()
        conversions.append(fn)
        if self.manager.strategy != "none":
            self.manager.device = wrapping.concrete(fn(torch.empty(0, device=self.manager.device)).device)
        for found in self.manager.slices.values():
            self.manager.stay_on_cpu(found)
        return self

    def close(self) -> None:
        """Ends the background thread and removes files; slices are plain modules in host memory, and run there."""
        self.manager.settle()
        for found in self.manager.slices.values():
            if found.module is not None and found.unit is not None:
                with found.unit.lock:
                    found.unit.device = torch.device("cpu")
                    found.unit.load()
                    found.unit.release()
        self.manager.device = torch.device("cpu")
        self.manager.close()
        if self.manager.disk is not None:
            self.manager.disk.close()
        for handler in list(self.log.handlers):
            self.log.removeHandler(handler)
            handler.close()

    # --- state ----------------------------------------------------------------------------------------------

    def save_state_dict(self, path: str | os.PathLike[str]) -> None:
        """Writes the state of every slice that has one: those that were made, and those whose state was loaded."""
        torch.save(self.slice_states(), path)

    def slice_states(self) -> dict[str, dict[str, Any]]:
        """The state of every slice that has one, by name, in host memory."""
        states = {}
        for name, found in self.manager.slices.items():
            if found.module is not None:
                states[name] = {key: value.detach().cpu() for key, value in found.module.state_dict().items()}
            elif found.pending is not None:
                states[name] = found.pending
        return states

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Takes the state of slices: a path that `save_state_dict` wrote, its content, or what `state_dict()` gave.

        A slice that was not made yet takes its state, as it is now, when it is. With ``strict``, what `state_dict()`
        gave has to be complete: a slice that was made and has no state there is an error, one that was not made is
        among the ``missing_keys``. States by slice may be some slices' only.
        """
        is_ours = isinstance(state_dict, str | os.PathLike)
        if is_ours:
            state_dict = torch.load(state_dict, map_location="cpu", weights_only=True)
        by_slice = _by_slice(state_dict)
        unknown = sorted(by_slice.keys() - self.manager.slices.keys())
        if unknown and strict:
            raise InvalidArgumentError(f"the state has slices that this model does not have: {', '.join(unknown)}")
        missing: list[str] = []
        unexpected = [f"slices.{name}" for name in unknown]
        is_flat = not _is_by_slice(state_dict)
        for name, found in self.manager.slices.items():
            if name not in by_slice and (found.module is None or not is_flat):
                missing += [f"slices.{name}"] if is_flat else []
            elif found.module is None:
                found.pending = by_slice[name] if is_ours else _copied(by_slice[name])
                found.strict = strict
            else:
                keys = found.module.load_state_dict(by_slice.get(name, {}), strict=strict, assign=assign)
                missing += [f"slices.{name}.{key}" for key in keys.missing_keys]
                unexpected += [f"slices.{name}.{key}" for key in keys.unexpected_keys]
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Also the state of slices that were not made yet; those that were made follow."""
        self._list_what_was_made()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, found in self.manager.slices.items():
            if found.module is None and found.pending is not None:
                destination.update({f"{prefix}slices.{name}.{key}": value for key, value in found.pending.items()})

    # --- how it stands --------------------------------------------------------------------------------------

    def summary(self) -> SlyceSummary:
        """Where every slice is, and its bytes on GPU, CPU and disk; ``print`` shows a table."""
        return summarize(self.manager, self._active)

    def events(self) -> list[Event]:
        """The last things that happened to slices, oldest first."""
        return self.manager.events()

    def log_gpu_usage(self) -> None:
        """Writes the bytes on the GPU to the log."""
        found = self.summary()
        self.log.info(
            "GPU: slices %.1f MiB, device %.1f MiB used", found.gpu_bytes / 2**20, found.gpu_used_bytes / 2**20
        )

    def log_cpu_usage(self) -> None:
        """Writes the bytes in host memory to the log."""
        found = self.summary()
        self.log.info("CPU: slices %.1f MiB, process %.1f MiB", found.cpu_bytes / 2**20, found.process_bytes / 2**20)


def _only_sends(conversion: Callable[[Any], Any]) -> bool:
    """Whether it is one of PyTorch's that give tensors another device and nothing else: of several the last counts."""
    if conversion.__module__ != "torch.nn.modules.module":
        return False
    cells = [each.cell_contents for each in conversion.__closure__ or ()]
    bound = dict(zip(conversion.__code__.co_freevars, cells, strict=True))
    to_device = bound.get("dtype", ...) is None and bound.get("convert_to_format", ...) is None
    return to_device or conversion.__qualname__.startswith(("Module.cpu.", "Module.cuda."))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The state in host memory of its own: whoever gave it may go on with it."""

    def copied(value: Any) -> Any:
        return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value

    return {key: copied(value) for key, value in state.items()}


def _is_by_slice(state: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Mapping) for value in state.values())


def _by_slice(state: Any) -> dict[str, dict[str, Any]]:
    """From either form: nested by slice, or flat with ``slices.NAME.`` in front."""
    if not isinstance(state, Mapping):
        raise InvalidArgumentError(f"a state is a path or a table, not {type(state).__name__}")
    if _is_by_slice(state):
        return {name: dict(value) for name, value in state.items()}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        prefix, name, rest = [*key.split(".", 2), "", ""][:3]
        if prefix != "slices" or not rest:
            raise InvalidArgumentError(f"{key!r} is no key of a SlyceModel's state, which are slices.NAME.KEY")
        nested.setdefault(name, {})[rest] = value
    return nested
