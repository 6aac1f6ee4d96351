"""The manager: wraps modules, keeps GPU and host memory below their thresholds, and tells how it stands."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from .._errors import InvalidArgumentError
from .._units import wrapping
from .._units.adopted import Movers
from .._units.disk import DiskStore
from .._units.readings import below, read_gpu
from .._units.residency import Event, Residency, is_out_of_memory
from .._units.unit import Unit
from ._config import MemoryConfig
from ._monitor import MemoryMonitor, MemoryStats
from ._strategies import CPUOffloadStrategy, DiskOffloadStrategy, SmartOffloadStrategy

logger = logging.getLogger("sire.memory")

_PREFETCH_DEPTH = 2
_GIB = 1 << 30


class ManagedMemory(Residency):
    """The residency of a manager's units: room is what the thresholds leave."""

    kind = "memory"

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.prefetch_depth = _PREFETCH_DEPTH if config.prefetch_enabled else 0
        self.idle_threshold = config.time_since_forward_threshold
        self.straight_to_disk = config.enable_disk_offload and not config.enable_cpu_offload
        self._fill = min(config.gpu_emergency_threshold, 1.0 - config.min_free_gpu_memory)
        self._cap = None if config.vram_cap_gb is None else int(config.vram_cap_gb * _GIB)

    def missing(self, unit: Unit, beside: int = 0) -> int:
        """Bytes beyond what loading may fill: emergency threshold, free share, cap."""
        return self._beyond(unit, self._fill, beside)

    def may_come_early(self, unit: Unit, beside: int = 0, given: int = 0) -> bool:
        """Up to the reload threshold, or in the place of what has gone for it, so that the GPU gets no fuller; never
        beyond the cap.
        """
        fill = self._fill if given >= unit.coming_bytes else min(self._fill, self.config.gpu_reload_threshold)
        return self._beyond(unit, fill, beside) == 0

    def left(self, unit: Unit) -> None:
        """After a forward it goes at once if that was asked for."""
        if self.config.aggressive_post_forward_offload and unit.device.type != "cpu":
            self.evict(unit)

    def happened(self, event: Event) -> None:
        """Into the log."""
        level = logging.WARNING if event.what == "failed" else logging.DEBUG
        logger.log(level, "%s %s: %d bytes, %.4f s %s", event.what, event.unit, event.bytes, event.seconds, event.note)

    def _beyond(self, unit: Unit, fill: float, beside: int) -> int:
        need = unit.coming_bytes + beside
        over = self.loaded_bytes(unit.device) + need - self._cap if self._cap is not None else 0
        if unit.device.type == "cuda":
            over = max(over, need - below(unit.device, fill))
        return max(0, over)

    def spare(self, device: Any) -> int:
        """What is free below the emergency threshold."""
        return below(device, self._fill) if device.type == "cuda" else 0

    def loaded_bytes(self, device: Any) -> int:
        """Bytes that units take on a device."""
        return sum(each.device_bytes for each in self.listed() if each.tier == "gpu" and each.here == device)


class MemoryManager:
    """Modules whose weights are on the GPU while they are used, and elsewhere when memory is short.

    Made with a `MemoryConfig`; `start` begins to look at memory now and then, `cleanup` ends everything and leaves a
    working model. Also a context manager that does both. Any thread may call any method.
    """

    def __init__(self, config: MemoryConfig | None = None, *, monitor: MemoryMonitor | None = None) -> None:
        self.config = config or MemoryConfig()
        self.config.validate()
        self.monitor = monitor or MemoryMonitor(self.config)
        self.disk = DiskStore(
            self.config.disk_cache_dir, int(self.config.max_disk_usage_gb * _GIB), self.config.compress_disk_cache
        )
        self.residency = ManagedMemory(self.config)
        self.strategy = SmartOffloadStrategy(
            CPUOffloadStrategy() if self.config.enable_cpu_offload else None,
            DiskOffloadStrategy(self.disk) if self.config.enable_disk_offload else None,
        )
        self._movers = Movers(self.config.pin_memory)
        self._modules: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._models: list[weakref.ref[Any]] = []
        self._lock = threading.RLock()
        self._started: float | None = None
        self._spent_before = 0.0
        self._automatic = True
        self._made = 0

    # --- beginning and end ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to look at memory now and then, and to act on it. Repeating it is harmless."""
        spent = self.monitor.seconds_spent
        self.monitor.start_monitoring(self._act)
        if self._started is None:
            self._started, self._spent_before = time.monotonic(), spent

    def stop(self) -> None:
        """Ends that; modules stay wrapped and are brought when they are called. Repeating it is harmless."""
        self.monitor.stop_monitoring(self._act)
        self.residency.settle()
        self._started = None

    def cleanup(self) -> None:
        """Ends everything: modules are plain again, with all of their weights, on the device to which their model was
        sent if all of it fits there, else on the CPU. Files are removed. The manager can be used again.
        """
        self.stop()
        with self._lock:
            models = [model for reference in self._models if (model := reference()) is not None]
            modules = list(self._mine().values())
            whole = self._all_loaded(modules)
            for module in modules:
                if not whole:
                    _to_host(module)
                wrapping.unwrap(module)
            if not whole:
                for model in [*models, *modules]:
                    model.to("cpu")
            self._modules.clear()
            self._models.clear()
        self.residency.close()
        self.strategy.cleanup_all()

    def __enter__(self) -> MemoryManager:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cleanup()

    def set_auto_management(self, enabled: bool) -> None:
        """Whether it acts on what it sees; off, units still come when they are used."""
        self._automatic = bool(enabled)

    # --- wrapping -------------------------------------------------------------------------------------------

    def wrap_module(self, module: Any, module_id: str | None = None) -> Any:
        """The module, in place: it brings its weights when it is called, and has ``offload_all`` and ``load_all``.

        Parameters and `state_dict` keys stay what they are. With ``eager_offload_on_wrap`` its weights leave the GPU
        now, and ``.to(device)`` says where they are to be used without moving them.
        """
        _refuse_other_than_modules(module)
        with self._lock:
            if self._is_mine(module):
                return module
            self._wrap(module, self._free_name(module_id, module))
            self._models.append(weakref.ref(module))
        return module

    def wrap_model(self, model: Any, layer_types: Iterable[type] | None = None) -> Any:
        """The model, with every layer of these types wrapped (default ``[nn.Linear]``), each a unit of its own.

        Layers whose weights their parent reads without calling them are wrapped together with it
        (`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`). A module that has weights of such layers is wrapped,
        too, whatever its type: an embedding that is tied to the head. What another manager had wrapped is this one's
        from now on.
        """
        import torch

        _refuse_other_than_modules(model)
        kinds = tuple([torch.nn.Linear] if layer_types is None else layer_types)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, torch.nn.Module) for kind in kinds):
            raise InvalidArgumentError(
                f"layer_types is a list of module classes such as [nn.Linear], not {layer_types!r}"
            )
        found = list(_layers(model, kinds, whole_classes()))
        if not found:
            logger.warning(
                "no layer of %s is a %s: nothing was wrapped", type(model).__name__, [k.__name__ for k in kinds]
            )
        found += _sharers(model, [layer for _, layer in found])
        with self._lock:
            for name, layer in found:
                if not self._is_mine(layer):
                    self._wrap(layer, self._free_name(name or type(model).__name__, layer))
            self._models.append(weakref.ref(model))
        return model

    def _wrap(self, module: Any, name: str) -> None:
        if wrapping.is_wrapped(module):
            wrapping.unwrap(module)  # another manager had it
        choose = self._leaves
        tensors, _ = wrapping.own_tensors(module, choose)
        _tell_of_wrappers(module, name)
        device = tensors[0].device if tensors else next((each.device for each in module.parameters()), _cpu())
        unit = Unit(
            name, tensors, device, self._movers.for_unit(), self.disk if self.config.enable_disk_offload else None
        )
        wrapping.wrap(module, unit, self.residency, choose)
        self._modules[name] = module
        if self.config.eager_offload_on_wrap and (self.config.enable_cpu_offload or self.config.enable_disk_offload):
            self.residency.offload(unit)

    def _leaves(self, tensor: Any) -> bool:
        """Whether a tensor is to leave the GPU."""
        big_enough = self.config.offload_1d_parameters or tensor.dim() > 1
        return bool(tensor.numel()) and big_enough and not _is_wrapper(tensor)

    def _is_mine(self, module: Any) -> bool:
        return wrapping.is_wrapped(module) and wrapping.unit_of(module).residency is self.residency

    def _mine(self) -> dict[str, Any]:
        """The modules that are wrapped by this manager, by their names."""
        return {name: module for name, module in sorted(self._modules.items()) if self._is_mine(module)}

    def _free_name(self, wanted: str | None, module: Any) -> str:
        name = wanted
        while name is None or name in self._modules:
            self._made += 1
            name = f"{wanted or type(module).__name__}-{self._made}"
        return name

    # --- all at once ----------------------------------------------------------------------------------------

    def offload_all_modules(self) -> int:
        """Everything that is not in use leaves the GPU; how many units did."""
        return sum(self.strategy.offload(unit, self.residency) for unit in self.residency.in_leaving_order("gpu"))

    def load_all_modules(self) -> int:
        """Brings as many units as have room, in the order in which they are expected; how many are where they
        belong.
        """
        units = {unit.name: unit for unit in self.residency.listed()}
        expected = [units[name] for name in self.residency.upcoming() if name in units]
        for unit in dict.fromkeys([*expected, *units.values()]):
            if unit.ready or self.residency.missing(unit) == 0:
                with contextlib.suppress(Exception), self.residency.lease(unit):
                    pass
        return sum(unit.ready for unit in units.values())

    def _all_loaded(self, modules: list[Any]) -> bool:
        """Whether all units could be brought at once; at the end nothing needs to be left free."""
        units = [wrapping.unit_of(module).unit for module in modules]
        coming = [unit for unit in units if unit.device.type == "cuda" and not unit.ready]
        for device in {unit.device for unit in coming}:
            if sum(unit.coming_bytes for unit in coming if unit.device == device) > read_gpu(device.index).free:
                return False
        for unit in units:
            try:
                with unit.lock:
                    unit.load()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return False
        return True

    # --- thresholds -----------------------------------------------------------------------------------------

    def _act(self, stats: MemoryStats) -> None:
        """What a look at memory leads to; an error is logged, and the next look tries again."""
        if not self._automatic:
            return
        try:
            self.relieve_gpus(stats)
            self.relieve_cpu(stats)
        except Exception:
            logger.exception("acting on memory pressure failed")

    def relieve_gpus(self, stats: MemoryStats) -> int:
        """Sends units away from GPUs that are too full; how many."""
        moved = 0
        for index, usage in stats.gpus.items():
            if usage.usage_ratio >= self.config.gpu_offload_threshold:
                emergency = usage.usage_ratio >= self.config.gpu_emergency_threshold
                excess = usage.used - int(usage.total * self.config.gpu_offload_threshold)
                here = [each for each in self.residency.in_leaving_order("gpu") if each.here.index == index]
                moved += self._relieve(here, excess, emergency)
        if moved and self.config.empty_cache_after_offload:
            _empty_cache()
        return moved

    def relieve_cpu(self, stats: MemoryStats) -> int:
        """Sends units from host memory to the disk if it is too full; how many."""
        if self.strategy.disk is None or stats.cpu.usage_ratio < self.config.cpu_offload_threshold:
            return 0
        emergency = stats.cpu.usage_ratio >= self.config.cpu_emergency_threshold
        excess = stats.cpu.used - int(stats.cpu.total * self.config.cpu_offload_threshold)
        return self._relieve(self.residency.in_leaving_order("cpu"), excess, emergency)

    def _relieve(self, units: list[Unit], excess: int, emergency: bool) -> int:
        """All of them in an emergency; else as many as make up for the excess, and one batch at most."""
        moved = 0
        for unit in units:
            if not emergency and (moved >= self.config.offload_batch_size or (moved and excess <= 0)):
                break
            size = unit.device_bytes
            if self.strategy.offload(unit, self.residency):
                moved, excess = moved + 1, excess - size
        return moved

    # --- how it stands --------------------------------------------------------------------------------------

    def get_memory_summary(self) -> dict[str, Any]:
        """Tables of ``gpu`` (the fullest), ``gpus``, ``cpu``, ``disk``, ``modules`` and ``system``; complete at any
        time.
        """
        summary = self.monitor.get_memory_summary()
        summary["disk"]["cache"] = self.disk.info()
        summary["modules"] = {name: module.get_memory_info() for name, module in self._mine().items()}
        summary["system"] = self._system(summary["modules"])
        return summary

    def _system(self, modules: dict[str, Any]) -> dict[str, Any]:
        counts = self.residency.counts
        uptime = 0.0 if self._started is None else time.monotonic() - self._started
        return {
            "active": self.monitor.monitoring,
            "auto_manage": self._automatic,
            "managed_modules": len(modules),
            "total_offloads": counts["offloads"],
            "total_reloads": counts["loads"],
            "total_demotions": counts["demotions"],
            "total_prefetches": counts["prefetches"],
            "hits": counts["hits"],
            "misses": counts["misses"],
            "bytes_copied": self.residency.copied_bytes,
            "uptime_seconds": uptime,
            "monitor_overhead": (self.monitor.seconds_spent - self._spent_before) / uptime if uptime else 0.0,
            "engine": self._movers.engine,
        }

    def events(self) -> list[Event]:
        """The last things that happened to units, oldest first."""
        return self.residency.events()


def create_memory_manager(config: MemoryConfig | None = None) -> MemoryManager:
    """A manager that looks at memory already."""
    manager = MemoryManager(config)
    manager.start()
    return manager


def auto_manage_model(
    model: Any, config: MemoryConfig | None = None, layer_types: Iterable[type] | None = None
) -> MemoryManager:
    """A manager that looks at memory already and has wrapped the model's layers (default ``[nn.Linear]``)."""
    manager = MemoryManager(config)
    manager.wrap_model(model, layer_types)
    try:
        manager.start()
    except BaseException:
        manager.cleanup()
        raise
    return manager


def wrap_module(module: Any, manager: MemoryManager, module_id: str | None = None) -> Any:
    """As `MemoryManager.wrap_module`."""
    return manager.wrap_module(module, module_id)


def wrap_model_layers(model: Any, manager: MemoryManager, layer_types: Iterable[type] | None = None) -> Any:
    """As `MemoryManager.wrap_model`."""
    return manager.wrap_model(model, layer_types)


def _layers(
    module: Any, kinds: tuple[type, ...], together: tuple[type, ...], name: str = ""
) -> Iterator[tuple[str, Any]]:
    """The outermost modules of these kinds with their names, and of those that read their children's weights the
    parent.
    """
    parts = module.modules() if issubclass(type(module), together) else [module]
    if any(isinstance(each, kinds) for each in parts):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _layers(child, kinds, together, f"{name}.{child_name}" if name else child_name)


def _sharers(model: Any, layers: list[Any]) -> Iterator[tuple[str, Any]]:
    """Modules with their names that have weights of these layers and are apart from them: when they are called, the
    weights must be there.
    """
    inside = {id(part) for layer in layers for part in layer.modules()}
    weights = {id(weight) for layer in layers for weight in layer.parameters()}
    for name, module in model.named_modules():
        has_some = any(id(weight) in weights for weight in module.parameters(recurse=False))
        if has_some and not any(id(part) in inside for part in module.modules()):
            yield name, module


def whole_classes() -> tuple[type, ...]:
    """Classes of modules that read their children's weights without calling the children."""
    import torch

    return (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)


def _to_host(module: Any) -> None:
    wrapped = wrapping.unit_of(module)
    with wrapped.unit.lock:
        wrapped.unit.release()
        if wrapped.unit.tier == "gpu":
            wrapped.unit.offload()
            wrapped.unit.release()


def _refuse_other_than_modules(module: Any) -> None:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise InvalidArgumentError(f"a torch.nn.Module can be wrapped, not {type(module).__name__}")


def _is_wrapper(tensor: Any) -> bool:
    """Whether the tensor has no memory of its own, but is made of others (quantized weights)."""
    return hasattr(tensor, "__tensor_flatten__")


def _tell_of_wrappers(module: Any, name: str) -> None:
    kinds = sorted({type(each).__name__ for each in module.parameters() if _is_wrapper(each)})
    if kinds:
        logger.warning(
            "%s has tensors of the classes %s, which are made of other tensors: they are where .to puts them, and do "
            "not leave the GPU; sire.manage moves such models as a whole",
            name,
            ", ".join(kinds),
        )


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _empty_cache() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
