"""On which device a module is to run, and what a transition of it needs beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from . import _blocks, _hooks, _library, _torch
from ._errors import CapturingError, LibraryNotFoundError, OutOfMemoryError

_T = TypeVar("_T")


def device_index(torch: Any, device: Any) -> int | None:
    """The ordinal of a CUDA device; None for the CPU, also where there is no device or no library and none is named."""
    if device is None:
        try:
            _library.load()
        except LibraryNotFoundError:
            return None
        if not torch.cuda.is_available():
            return None
    elif not isinstance(device, int) and torch.device(device).type == "cpu":
        return None
    _torch.ready_torch()
    return _torch.device_index(torch, device)


def refuse_capture(doing: str) -> None:
    """Raises where memory must not change."""
    _hooks.hook_mode()
    if _torch.capturing():
        raise CapturingError(
            f"cannot {doing} a module during the capture of a CUDA graph: end the capture first, memory must not "
            "change under it"
        )


def with_room(take: Callable[[], _T], again: Callable[[], _T] | None = None) -> _T:
    """Tries again without what PyTorch only caches, if memory is short; ``again``: more patiently."""
    try:
        return take()
    except OutOfMemoryError:
        _blocks.empty_cache()
    return (again or take)()
