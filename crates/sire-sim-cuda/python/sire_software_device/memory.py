"""Between device tensors and the CPU: aliases of device bytes for CPU kernels, and results brought back to the device.

An alias does not keep its tensor alive; whoever makes one holds the tensor for as long as the alias is used. Every range is
checked with the stand-in before it is touched, so a paused tensor gives CUDA's error instead of a signal.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from . import runtime

_CPU = torch.device("cpu")
_DEVICES = [torch.device("cuda", index) for index in range(64)]
_storage_at: Any = torch._C._construct_storage_from_data_pointer
_empty = torch.empty
_empty_strided = torch.empty_strided
_check = runtime._check
_memmove = ctypes.memmove


def cuda(index: int) -> torch.device:
    """The device of that ordinal."""
    return _DEVICES[index]


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return int(tensor.nbytes)
    last = 0
    for size, stride in zip(tensor.size(), tensor.stride(), strict=True):
        if size == 0:
            return 0
        last += (size - 1) * stride
    return int((last + 1) * tensor.itemsize)


def alias(tensor: torch.Tensor, write: bool) -> torch.Tensor:
    """A CPU tensor on the device tensor's bytes."""
    length = extent(tensor)
    if length == 0:
        return _empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    pointer = tensor.data_ptr()
    device = tensor.get_device()
    status = _check(pointer, length, device, write)
    if status:
        runtime.fail(status, device)
    result = _empty(0, dtype=tensor.dtype, device=_CPU).set_(_storage_at(pointer, _CPU, length), 0, tensor.size(), tensor.stride())
    return _flags(tensor, result) if tensor.is_complex() or tensor.is_neg() else result


def _flags(tensor: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    if tensor.is_conj():
        result = torch._conj(result)
    return torch._neg_view(result) if tensor.is_neg() else result


class Borrow:
    """Aliases for one operation that writes: tensors of one storage share one CPU storage, so PyTorch's overlap checks see it."""

    __slots__ = ("_storages",)

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}

    def alias(self, tensor: torch.Tensor, write: bool) -> torch.Tensor:
        length = extent(tensor)
        if length == 0:
            return _empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        device = tensor.get_device()
        status = _check(tensor.data_ptr(), length, device, write)
        if status:
            runtime.fail(status, device)
        whole = tensor.untyped_storage()
        pointer = whole.data_ptr()
        storage = self._storages.get(pointer)
        if storage is None:
            storage = self._storages[pointer] = _storage_at(pointer, _CPU, whole.nbytes())
        result = _empty(0, dtype=tensor.dtype, device=_CPU).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        return _flags(tensor, result) if tensor.is_complex() or tensor.is_neg() else result


def plain(result: torch.Tensor) -> torch.Tensor:
    """The same values without lazy conjugation or negation, so that the bytes can be copied."""
    if result.layout is not torch.strided:
        raise NotImplementedError(f"a result of layout {result.layout} has no place on the software CUDA device")
    if result._is_zerotensor():
        return torch.zeros_like(result)
    return result.resolve_conj().resolve_neg()


def allocate_like(result: torch.Tensor, device: int) -> torch.Tensor:
    """An uninitialised device tensor of the same shape, strides and type, from PyTorch's own allocator."""
    return _empty_strided(result.size(), result.stride(), dtype=result.dtype, device=_DEVICES[device])


def to_device(result: torch.Tensor, device: int) -> torch.Tensor:
    """A device tensor with a CPU result's bytes and strides."""
    if result.is_complex() or result.is_neg() or result.layout is not torch.strided:
        result = plain(result)
    target = _empty_strided(result.size(), result.stride(), dtype=result.dtype, device=_DEVICES[device])
    put(target, result, device)
    return target


def put(target: torch.Tensor, result: torch.Tensor, device: int) -> None:
    """Copy a CPU result into a device tensor of the same shape and strides."""
    length = extent(result)
    if length == 0:
        return
    pointer = target.data_ptr()
    status = _check(pointer, length, device, 1)
    if status:
        runtime.fail(status, device)
    source = result.data_ptr()
    if source == 0:  # a tensor of zeros that has no storage yet
        result = plain(result)
        source = result.data_ptr()
    _memmove(pointer, source, length)
