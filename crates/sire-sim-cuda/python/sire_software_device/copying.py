"""`copy_` between devices and the host: PyTorch's native path where one memcpy does it, the CPU's kernel on aliases otherwise."""

from __future__ import annotations

from typing import Any

import torch

from . import capture, memory, runtime

_copy = torch.ops.aten.copy_.default
_NATIVE = torch._C.DispatchKey.CompositeExplicitAutograd


def _one_memcpy(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether both have the same type, shape and dense layout, so that PyTorch copies bytes and launches no kernel."""
    return (
        target.dtype == source.dtype
        and target.shape == source.shape
        and target.is_contiguous()
        and source.is_contiguous()
        and target.is_conj() == source.is_conj()
        and target.is_neg() == source.is_neg()
        and target.layout is source.layout
    )


def _lend(tensor: torch.Tensor, borrow: memory.Borrow, write: bool) -> torch.Tensor:
    return borrow.alias(tensor, write) if tensor.is_cuda else tensor


def copy_(self: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`aten::copy_` where one of the two is on the device."""
    if _one_memcpy(self, src):
        _copy._op_dk(_NATIVE, self, src, non_blocking)
        return self
    places = sorted({tensor.get_device() for tensor in (self, src) if tensor.is_cuda})
    borrow = memory.Borrow()
    recording = capture.recording(places[0])
    if recording and not (self.is_cuda and src.is_cuda):
        runtime.refuse_in_capture(places[0], "aten::copy_ between host and device")
    if not recording:
        for place in places:
            runtime.wait(place)
    target, source = _lend(self, borrow, True), _lend(src, borrow, False)
    if not recording:
        target.copy_(source)
        return self
    capture.current(places[0]).add(runtime.raw_stream(places[0]), _node(target, source, self.get_device(), src.get_device()))
    return self


def _node(target: torch.Tensor, source: torch.Tensor, target_device: int, source_device: int) -> Any:
    def replay() -> None:
        if not runtime.reachable(target.data_ptr(), memory.extent(target), target_device, True):
            return
        if runtime.reachable(source.data_ptr(), memory.extent(source), source_device, False):
            target.copy_(source)

    return replay
