"""Which slices are on the GPU, in host memory and on the disk: a budget, who leaves, what is brought in advance.

A slice is a unit with a name, made by its constructor when it is first needed. Everything that moves is `sire._units`;
here is what the three strategies mean.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from .._errors import InvalidArgumentError, UnsupportedError
from .._units import wrapping
from .._units.adopted import Movers
from .._units.disk import DiskStore
from .._units.order import Standing, usage_order
from .._units.readings import below, read_cpu
from .._units.residency import Event, Residency, shown
from .._units.unit import Unit

Strategy = Literal["none", "active_only", "limit_gpu"]
STRATEGIES = ("none", "active_only", "limit_gpu")

_MIB = 1 << 20
_FULL_HOST = 0.90
_FULL_GPU = 0.90


@dataclass
class Slice:
    """One part of a model: how it is made, and, once it was, its module and unit."""

    name: str
    constructor: Callable[..., Any]
    config: Any = None
    module: Any = None
    unit: Unit | None = None
    pending: dict[str, Any] | None = None
    """State that was loaded before the slice was made."""
    strict: bool = True
    """Whether it has to be complete."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def construct(self) -> Any:
        """A new module, in host memory. A dict as ``config`` is keyword arguments, a tuple or list arguments."""
        import torch

        with torch.device("cpu"):
            if isinstance(self.config, dict):
                made = self.constructor(**self.config)
            elif isinstance(self.config, tuple | list):
                made = self.constructor(*self.config)
            else:
                made = self.constructor() if self.config is None else self.constructor(self.config)
        if not isinstance(made, torch.nn.Module):
            raise InvalidArgumentError(
                f"the constructor of slice {self.name!r} gave a {type(made).__name__}, not a torch.nn.Module"
            )
        return made


class SliceManager(Residency):
    """Brings slices when they are used, and sends others away by what the strategy says.

    ``none``: everything runs on the CPU. ``active_only``: one slice is on the device. ``limit_gpu``: as many as fit
    into ``max_gpu_mem_mb`` MiB (default: what the device has free, up to 90 %). Who leaves is said by usage: what is
    expected soon stays, of the rest what is used most stays. The limits count parameters, buffers and gradients of
    slices.
    """

    kind = "slyce"

    def __init__(
        self,
        strategy: Strategy = "none",
        *,
        max_gpu_mem_mb: float | None = None,
        max_cpu_mem_mb: float | None = None,
        disk: DiskStore | None = None,
        device: Any = None,
        prefetch: bool = True,
        log: logging.Logger | None = None,
    ) -> None:
        super().__init__()
        self.strategy = _checked(strategy, max_gpu_mem_mb, max_cpu_mem_mb, disk)
        self.device = _device(strategy, device)
        self.budget = None if max_gpu_mem_mb is None else int(max_gpu_mem_mb * _MIB)
        self.cpu_budget = None if max_cpu_mem_mb is None else int(max_cpu_mem_mb * _MIB)
        self.disk = disk
        self.prefetch_depth = 1 if prefetch else 0
        self.slices: dict[str, Slice] = {}
        self.conversions: list[Callable[[Any], Any]] = []
        """What the model was converted by; each slice that is made is, too."""
        self.trainable: bool | None = None
        """Whether slices that are made need gradients; None: as their constructors say."""
        self._log = log or logging.getLogger("sire.slyce")
        self._movers = Movers()
        self._plan: list[str] = []

    # --- slices ---------------------------------------------------------------------------------------------

    def register(self, name: str, constructor: Callable[..., Any], config: Any = None) -> Slice:
        """A slice that is made when it is first needed."""
        if not isinstance(name, str) or not name or "." in name:
            raise InvalidArgumentError(f"a slice's name is a text without dots, not {name!r}")
        if name in self.slices:
            raise InvalidArgumentError(f"there is a slice {name!r} already; erase it first, or choose another name")
        if not callable(constructor):
            raise InvalidArgumentError(f"the constructor of slice {name!r} is a class or function, not {constructor!r}")
        self.slices[name] = Slice(name, constructor, config)
        return self.slices[name]

    def standing(self) -> list[dict[str, Any]]:
        """Also of the slices that were not made yet."""
        unmade = {"tier": "not made", "bytes": 0, "uses": 0}
        slices = list(self.slices.values())
        return [{"name": each.name, **unmade} if each.unit is None else shown(each.unit) for each in slices]

    def slice(self, name: str) -> Slice:
        """The slice of this name; `InvalidArgumentError` if there is none."""
        if name not in self.slices:
            raise InvalidArgumentError(f"there is no slice {name!r}; there are {', '.join(self.slices) or 'none'}")
        return self.slices[name]

    def made(self, name: str) -> Slice:
        """The slice, with its module."""
        found = self.slice(name)
        with found.lock:
            if found.module is None:
                started = time.perf_counter()
                self._wrap(found, self._constructed(found))
                try:
                    self._catch_up(found)
                except BaseException:
                    wrapping.unwrap(found.module)
                    found.module = found.unit = None
                    raise
                self._log.info("slice %s constructed in %.3f s", name, time.perf_counter() - started)
        return found

    def _constructed(self, found: Slice) -> Any:
        """A new module, whose unit is to know which of its tensors need gradients."""
        made = found.construct()
        return made if self.trainable is None else made.requires_grad_(self.trainable)

    def _catch_up(self, found: Slice) -> None:
        """What the model went through before the slice was made. State comes last: some conversions leave none."""
        for conversion in self.conversions:
            found.module._apply(conversion)
        self.stay_on_cpu(found)
        if found.pending is not None:
            found.module.load_state_dict(found.pending, strict=found.strict)
            found.pending = None

    def stay_on_cpu(self, found: Slice) -> None:
        """Wherever a model without a GPU strategy is sent, its slices run on the CPU."""
        import torch

        if self.strategy == "none" and found.unit is not None:
            with found.unit.lock:
                found.unit.device = torch.device("cpu")

    def erase(self, name: str) -> None:
        """Forgets a slice's module and its state; the next use makes it anew."""
        found = self.slice(name)
        with found.lock:
            if found.module is not None:
                wrapping.unwrap(found.module)
            found.module = found.unit = found.pending = None

    def _wrap(self, found: Slice, module: Any) -> None:
        tensors, _ = wrapping.own_tensors(module, _has_bytes)
        unit = Unit(found.name, tensors, self.device, self._movers.for_unit(), self.disk)
        unit.in_use = False
        wrapping.wrap(module, unit, self, _has_bytes)
        found.module, found.unit = module, unit

    # --- by name --------------------------------------------------------------------------------------------

    def load(self, name: str, non_blocking: bool = False) -> Future[bool] | None:
        """Brings a slice to where it runs; in the background with ``non_blocking``, if there is room without asking
        anybody.
        """
        unit = self._unit(name)
        if non_blocking:
            return self.prefetch(unit)
        with self.lease(unit):
            return None

    def offload_slice(self, name: str, non_blocking: bool = False) -> Future[None] | None:
        """One tier down: from the GPU to host memory, from there to the disk. `sire.BusyError` while it is in use."""
        unit = self._unit(name)
        if non_blocking:
            return self.in_background(lambda: self._down(unit))
        self._down(unit)
        return None

    def schedule(self, names: Sequence[str]) -> None:
        """Slices will be used in this order, again and again: each brings the next one in the background."""
        for name in names:
            self.slice(name)
        self._plan = list(names)

    def pin(self, name: str, pinned: bool = True) -> None:
        """A pinned slice stays where it is."""
        self._unit(name).pinned = pinned

    def _unit(self, name: str) -> Unit:
        unit = self.made(name).unit
        if unit is None:  # pragma: no cover - made() has just seen to it
            raise UnsupportedError(f"slice {name!r} has no module")
        return unit

    def _down(self, unit: Unit) -> None:
        if unit.tier == "gpu":
            self.offload(unit)
            self.relieve_cpu()
        elif self.disk is None:
            raise InvalidArgumentError(f"slice {unit.name!r} cannot go further: give disk_cache_path for a disk tier")
        else:
            self.demote(unit)

    # --- what the strategies mean -----------------------------------------------------------------------------

    def fits(self, unit: Unit) -> bool:
        """Whether the slice alone is within the limit."""
        return self.strategy != "limit_gpu" or self.budget is None or unit.device_bytes <= self.budget

    def missing(self, unit: Unit, beside: int = 0) -> int:
        """Bytes of other slices that must leave the device."""
        others = sum(each.device_bytes for each in self.listed() if each is not unit and each.tier == "gpu")
        if self.strategy == "active_only":
            return others
        if self.budget is not None:
            return max(0, others + unit.device_bytes + beside - self.budget)
        return max(0, unit.coming_bytes + beside - self.spare(unit.device))

    def may_come_early(self, unit: Unit, beside: int = 0, given: int = 0) -> bool:
        """Only beside what is there, and never a second one under ``active_only``."""
        return self.strategy == "limit_gpu" and self.fits(unit) and self.missing(unit, beside) == 0

    def spare(self, device: Any) -> int:
        """What the device has free, up to 90 % of it."""
        return below(device, _FULL_GPU) if device.type == "cuda" else 0

    def choose(self, candidates: dict[str, Standing], upcoming: list[str]) -> list[str]:
        """By usage."""
        return usage_order(candidates, upcoming)

    def upcoming(self, limit: int | None = None) -> list[str]:
        """By the plan if the slice used last is in it, else as it was before."""
        last = max(self.listed(), key=lambda each: each.last_used, default=None)
        if last is not None and last.name in self._plan:
            at = self._plan.index(last.name) + 1
            return list(dict.fromkeys([*self._plan[at:], *self._plan[:at]]))[:limit]
        return super().upcoming(limit)

    def without_room(self, unit: Unit) -> None:
        """A slice that cannot come early comes from the disk into host memory at least."""
        unit.promote()

    def left(self, unit: Unit) -> None:
        """Host memory is looked at."""
        self.relieve_cpu()

    def relieve_cpu(self) -> int:
        """Sends slices to the disk until host memory is within its limit; how many went."""
        if self.disk is None or not self._host_is_full():
            return 0
        gone = 0
        for unit in self.in_leaving_order("cpu"):
            if not self._host_is_full():
                break
            gone += self.demote(unit)
        return gone

    def _host_is_full(self) -> bool:
        if self.cpu_budget is None:
            return read_cpu().usage_ratio >= _FULL_HOST
        return sum(each.nbytes for each in self.listed() if each.tier == "cpu") > self.cpu_budget

    def happened(self, event: Event) -> None:
        """Into the log."""
        level = logging.WARNING if event.what == "failed" else logging.INFO
        self._log.log(
            level,
            "slice %s: %s, %.1f MiB in %.3f s %s",
            event.unit,
            event.what,
            event.bytes / _MIB,
            event.seconds,
            event.note,
        )


def _has_bytes(tensor: Any) -> bool:
    return bool(tensor.numel())


def _device(strategy: Strategy, device: Any) -> Any:
    import torch

    if strategy == "none":
        return torch.device("cpu")
    return wrapping.default_device() if device is None else wrapping.concrete(torch.device(device))


def _checked(strategy: Any, gpu: Any, cpu: Any, disk: DiskStore | None) -> Strategy:
    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"gpu_strategy is 'none', 'active_only' or 'limit_gpu', not {strategy!r}")
    for name, value in (("max_gpu_mem_mb", gpu), ("max_cpu_mem_mb", cpu)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise InvalidArgumentError(f"{name} is a number of MiB above 0, not {value!r}")
    if cpu is not None and disk is None:
        raise InvalidArgumentError("max_cpu_mem_mb needs disk_cache_path: what leaves host memory goes to the disk")
    chosen: Strategy = strategy
    return chosen
