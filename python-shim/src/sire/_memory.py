"""Questions and orders about single tensors, and about the process's memory as a whole."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, NamedTuple

from . import _library
from ._errors import InvalidArgumentError, UnknownAddressError
from ._sizes import Size, parse_size
from ._tags import encode_selection, is_within


class Trimmed(NamedTuple):
    """What `trim` gave back."""

    device_bytes: int
    host_bytes: int


class _Span(NamedTuple):
    pointer: int
    size: int


def keep(tensor: Any) -> None:
    """The tensor's bytes are backed up at a pause, whatever its region says.

    Of a strided view, everything between its first and its last element.
    """
    where, _ = span(tensor, "keep")
    if where.size:
        _library.load().keep(*where)


def discard(tensor: Any) -> None:
    """The tensor's bytes are thrown away at a pause, whatever its region says."""
    where, dense = span(tensor, "discard")
    if not dense:
        raise InvalidArgumentError(
            "discard takes a tensor without gaps: in a strided view, bytes of other elements lie between its own"
        )
    if where.size:
        _library.load().discard(*where)


def keep_resident(tensor: Any) -> int:
    """The allocation that holds the tensor stays on the device at every pause, until it is freed; the rest of its
    region goes. Returns how many bytes stay: 0 for a tensor outside of every region, which no pause takes anyway.

    With PyTorch that is the whole segment that the tensor was cut from (2 MiB at least), other tensors included.
    Refused while the tensor's region is paused.
    """
    where, _ = span(tensor, "keep_resident")
    library = _library.load()
    if not where.size or not library.owns(where.pointer):
        return 0
    return library.keep_resident(where.pointer)


def changed(tensor: Any) -> None:
    """The tensor, in a region that is ``immutable``, was written to: the next pause copies it again.

    Of a strided view, everything between its first and its last element.
    """
    where, _ = span(tensor, "changed")
    if where.size:
        _library.load().changed(*where)


def get_cpu_backup(tensor: Any, zero_copy: bool = False) -> Any | None:
    """The tensor's bytes in its host backup, as a CPU tensor; None if it has no backup now.

    With ``zero_copy`` the result is a view of the backup itself, which it keeps alive; treat it as read-only.
    """
    import torch

    where, _ = span(tensor, "get_cpu_backup")
    if not tensor.is_contiguous():
        raise InvalidArgumentError("get_cpu_backup takes a contiguous tensor")
    if not where.size:
        return torch.empty_like(tensor, device="cpu")
    library = _library.load()
    if not library.owns(where.pointer):
        raise UnknownAddressError(
            f"the tensor at {where.pointer:#x} was not allocated in a region, so it has no backup"
        )
    found = library.backup_get(*where)
    if found is None:
        return None
    view = _tensor_over(torch, library, found, where.size).view(tensor.dtype).view(tensor.shape)
    return view if zero_copy else view.clone()


def _tensor_over(torch: Any, library: _library.Library, found: tuple[int, int], size: int) -> Any:
    address, token = found

    class Backup(ctypes.c_ubyte * size):  # type: ignore[misc]
        """Host memory of the library's; a class of its own so that it can be watched."""

    buffer = Backup.from_address(address)
    weakref.finalize(buffer, library.backup_put, token).atexit = False
    return torch.frombuffer(buffer, dtype=torch.uint8)


def span(tensor: Any, asking: str) -> tuple[_Span, bool]:
    """The bytes from the tensor's first to its last element, and whether all of them are its own."""
    if not hasattr(tensor, "data_ptr") or not hasattr(tensor, "stride"):
        raise InvalidArgumentError(f"{asking} takes a tensor, not {type(tensor).__name__}")
    if not tensor.is_cuda:
        raise InvalidArgumentError(f"{asking} takes a CUDA tensor, not one on {tensor.device}")
    count = tensor.numel()
    if count == 0:
        return _Span(0, 0), True
    reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return _Span(tensor.data_ptr(), reach * tensor.element_size()), reach == count


def stats() -> dict[str, Any]:
    """Everything observable: devices, regions, tiers, counters (docs/abi.md lists the fields)."""
    return _library.load().stats()


def held(tag: str | None = None) -> dict[str, int]:
    """What a pause of the tag (None: of everything) will leave on the device: bytes, by the reason.

    That is memory that was handed to other processes (exported, retained) or registered under its address, as far as
    the library saw it, and what `keep_resident` names. Empty where a pause gives everything back.
    """
    encode_selection(tag)
    found: dict[str, int] = {}
    for region in stats()["regions"]:
        if is_within(region["tag"], tag):
            for reason, size in region["held"].items():
                found[reason] = found.get(reason, 0) + size
    return found


def trim() -> Trimmed:
    """Frees what is only cached: retained backups, slack, empty slabs."""
    return Trimmed(*_library.load().trim())


def set_margin(size: Size) -> None:
    """Device memory that Sire leaves free."""
    _library.load().set_margin(parse_size(size))


def set_disk_directory(path: str | os.PathLike[str]) -> None:
    """Where backups of ``backup="disk"`` are kept."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise InvalidArgumentError("a path does not contain NUL")
    _library.load().set_disk_directory(encoded)
