"""The library as PyTorch's only CUDA allocator, and what PyTorch then no longer answers by itself.

Under any allocator but its own, PyTorch refuses to say how much memory is in use. The library's cache counts the same
things under the same names, so `memory_stats` and `memory_snapshot` have PyTorch's shape, and `use_allocator` makes
``torch.cuda.memory_allocated`` and its relatives ask here, until `Allocator.close`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _blocks, _hooks, _library, _torch
from ._errors import UnsupportedError


def memory_stats(device: Any = None) -> dict[str, int]:
    """What the cache of a device counts, in the shape of ``torch.cuda.memory_stats``.

    For programs that use the library as their allocator; others find zeros here, and other counts in `stats`.
    """
    named = _library.load().memory_stats(_index(device))
    named["max_split_size"] = -1
    return dict(sorted(named.items()))


def memory_snapshot() -> list[dict[str, Any]]:
    """Every segment and block of the cache, in the shape of ``torch.cuda.memory_snapshot``, with its region's ``tag``.

    Blocks are in the order of addresses. PyTorch's stack traces (``frames``) are not recorded.
    """
    return _library.load().memory_snapshot()


def reset_peak_memory_stats(device: Any = None) -> None:
    """The most that there has been is from now on what there is now."""
    _library.load().memory_stats_reset(_index(device), False)


def reset_accumulated_memory_stats(device: Any = None) -> None:
    """What has come and gone is counted anew."""
    _library.load().memory_stats_reset(_index(device), True)


def empty_cache() -> int:
    """Gives the driver what is only cached, by PyTorch or, where it is its allocator, by the library; how many bytes.

    Beyond ``torch.cuda.empty_cache()``, which leaves what is free in a pool (pytorch#145168), it gives back the memory
    of a region's dead tensors: whole segments, in pools of regions that no thread is in. Without it that memory stays
    until the region is paused. While the current stream captures a graph, PyTorch's cache is left alone.
    """
    return _blocks.empty_cache() + _library.load().empty_cache()


# By device, what `set_per_process_memory_fraction` was last given: the library keeps it as bytes.
_fractions: dict[int, float] = {}


def _index(device: Any) -> int:
    torch = _torch.loaded_torch()
    if torch is not None:
        return _torch.device_index(torch, device)
    return device if isinstance(device, int) else 0


class Allocator:
    """What `use_allocator` returns. The allocator itself stays for the life of the process; `close` gives PyTorch its
    own functions for questions about memory back (which then raise, as under any pluggable allocator).

    As a context manager it closes at the end. Closing twice is nothing.
    """

    def __init__(self, torch: Any, answers: bool) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []
        if answers:
            self._answer(torch.cuda, _answers(torch))
            self._answer(torch.accelerator, _accelerator_answers(torch))

    def _answer(self, module: Any, answers: dict[str, Callable[..., Any]]) -> None:
        for name, answer in answers.items():
            self._replace(module.memory, name, answer)
            self._replace(module, name, answer)

    def _replace(self, module: Any, name: str, answer: Callable[..., Any]) -> None:
        if hasattr(module, name):
            self._replaced.append((module, name, getattr(module, name)))
            setattr(module, name, answer)

    @property
    def answers(self) -> bool:
        """Whether PyTorch's questions about memory are answered here."""
        return bool(self._replaced)

    def close(self) -> None:
        """PyTorch's own functions again, where nobody else has replaced them since."""
        while self._replaced:
            module, name, original = self._replaced.pop()
            if getattr(getattr(module, name), "__module__", None) == __name__:
                setattr(module, name, original)

    def __enter__(self) -> Allocator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answers(torch: Any) -> dict[str, Callable[..., Any]]:
    """By name; PyTorch's other functions (`memory_allocated`, `memory_summary`, ...) call these."""

    def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
        return _nested(memory_stats(device)) if torch.cuda.is_initialized() else {}

    def memory_snapshot_for_torch(mempool_id: Any = None, include_traces: bool = True) -> list[dict[str, Any]]:
        del include_traces  # there are none
        wanted = None if mempool_id is None else tuple(mempool_id)
        return [each for each in memory_snapshot() if wanted in (None, tuple(each["segment_pool_id"]))]

    set_fraction = torch.cuda.memory.set_per_process_memory_fraction

    def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
        set_fraction(fraction, device)
        _fractions[_index(device)] = fraction

    def get_per_process_memory_fraction(device: Any = None) -> float:
        return _fractions.get(_index(device), 1.0)

    return {
        "memory_stats_as_nested_dict": memory_stats_as_nested_dict,
        "memory_snapshot": memory_snapshot_for_torch,
        "reset_peak_memory_stats": reset_peak_memory_stats,
        "reset_accumulated_memory_stats": reset_accumulated_memory_stats,
        "set_per_process_memory_fraction": set_per_process_memory_fraction,
        "get_per_process_memory_fraction": get_per_process_memory_fraction,
    }


def _accelerator_answers(torch: Any) -> dict[str, Callable[..., Any]]:
    """The same for ``torch.accelerator``, which asks PyTorch's own allocator whatever the current one is: it would say
    that there is no memory in use.
    """

    def memory_stats_of(device_index: Any = None, /) -> dict[str, int]:
        return memory_stats(device_index) if torch.cuda.is_initialized() else {}

    def empty_cache_of_the_device() -> None:
        torch.cuda.empty_cache()

    return {
        "memory_stats": memory_stats_of,
        "reset_peak_memory_stats": reset_peak_memory_stats,
        "reset_accumulated_memory_stats": reset_accumulated_memory_stats,
        "empty_cache": empty_cache_of_the_device,
    }


def _nested(flat: dict[str, int]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return nested


def use_allocator(*, answers: bool = True) -> Allocator:
    """Makes the library PyTorch's only CUDA allocator. Call it once, before anything uses CUDA.

    Tensors then come from the library's own cache, each in the region that its thread is in. Outside all that is
    ``"default"``, which keeps no backup unless ``SIRE_BACKUP`` names one: a pause loses its content. With ``answers``,
    ``torch.cuda.memory_allocated``, ``memory_stats``, ``reset_peak_memory_stats`` and relatives are answered from that
    cache (PyTorch itself refuses them under any allocator but its own), until the result is closed.
    """
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(f"use_allocator() needs PyTorch, which cannot be imported: {error}") from error
    _torch.refuse_version(torch)
    if _hooks.known_hook_mode() is None and not _library.load().hook_live():
        _hooks.set_hook_mode("allocator")
    _torch.become_allocator(torch)
    return Allocator(torch, answers)
