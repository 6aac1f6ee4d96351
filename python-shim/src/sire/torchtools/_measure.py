"""Measuring what a function needs: on a GPU in this process, and with fake tensors on none."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import _library
from .._threads import starting
from . import _nvml
from .device import uuid

# Between two looks at the driver's figure and at the tags.
_LOOK_SECONDS = 0.005


def run(function: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Calls the function with a GPU current; the fields of a `ProbeReport`."""
    import torch

    name = uuid(torch, index)
    before = _nvml.memory(name)
    torch.cuda.set_device(index)
    torch.cuda.synchronize()
    gauge = _gauge(torch, index, name, before.used if before is not None else 0)
    context = gauge()
    watcher = _Watcher(gauge)
    begun = time.perf_counter()
    with watcher:
        function(*args, **kwargs)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    reserved, allocated = (int(torch.cuda.memory_stats(index).get(f"{what}_bytes.all.peak", 0)) for what in _COUNTERS)
    held = int(torch.cuda.memory_stats(index).get("reserved_bytes.all.current", 0))
    # What the allocator had at its peak is known exactly; beside it is what libraries and the driver have at the end.
    beside = max(0, watcher.last - context - held)
    return {
        "peak_bytes": max(watcher.peak - context, reserved + beside),
        "context_bytes": context,
        "torch_peak_bytes": reserved,
        "torch_peak_allocated_bytes": allocated,
        "tags": watcher.tags,
        "seconds": seconds,
        "device": torch.cuda.get_device_name(index),
    }


_COUNTERS = ("reserved", "allocated")


def _gauge(torch: Any, index: int, name: str, used_before: int) -> Callable[[], int]:
    """How to ask for the bytes of the GPU that this process has. Where its own figure is not to be had (as in a
    container), it is what all processes have, less what they had before: right as long as nobody else comes or goes.
    """
    if _nvml.used_by(name) is not None:
        return lambda: _nvml.used_by(name) or 0

    def all_others_too() -> int:
        memory = _nvml.memory(name)
        if memory is not None:
            return max(0, memory.used - used_before)
        free, total = torch.cuda.mem_get_info(index)
        return int(total - free)

    return all_others_too


class _Watcher:
    """Looks again and again while it is entered: the most that the process had, and the most of each tag."""

    def __init__(self, used: Callable[[], int]) -> None:
        self._used = used
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sire-probe", daemon=True)
        self.peak = 0
        self.last = 0
        self.tags: dict[str, int] = {}

    def __enter__(self) -> _Watcher:
        self._look()
        with starting():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self.last = self._used()
        self.peak = max(self.peak, self.last)
        if _library.is_loaded():
            for region in _library.load().stats()["regions"]:
                tag, resident = str(region["tag"]), int(region["resident_bytes"])
                self.tags[tag] = max(self.tags.get(tag, 0), resident)


# --- without running -------------------------------------------------------------------------------------


def fake_peak(function: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The most bytes of storages that are alive at once while the function runs on fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    ledger = _Alive()

    class Count(TorchDispatchMode):  # type: ignore[misc]
        """Sees every result of every operation."""

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operation(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    ledger.note(leaf.untyped_storage())
            return result

    # Outermost the counting, so that it sees fake results.
    with FakeTensorMode(allow_non_fake_inputs=True), Count(), torch.device("cpu"):
        _on_the_cpu(function)(*args, **kwargs)
    return ledger.peak


def _on_the_cpu(function: Callable[..., object]) -> Callable[..., object]:
    from dataclasses import replace

    from .gpu_scheduler import ProbeFunction

    return replace(function, device="cpu") if isinstance(function, ProbeFunction) else function


class _Alive:
    """Bytes of storages, each for as long as it lives, rounded up as PyTorch's allocator does."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-int(storage.nbytes()) // 512) * 512
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)
