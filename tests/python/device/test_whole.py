"""Regions that are `whole`: what the driver says of a pointer is all of its allocation."""

from __future__ import annotations

import ctypes

import pytest
import sire
import torch

MIB = 1 << 20


def _said_by_the_driver(tensor: torch.Tensor) -> tuple[int, int]:
    """Start and bytes of the memory around a tensor's last byte (RANGE_START_ADDR, RANGE_SIZE)."""
    with open("/proc/self/maps") as maps:
        path = next(line.split()[-1] for line in maps if "libcuda.so" in line or "libsire_sim_cuda" in line)
    driver = ctypes.CDLL(path)
    start, size = ctypes.c_uint64(), ctypes.c_size_t()
    last = ctypes.c_uint64(tensor.data_ptr() + tensor.nbytes - 1)
    assert driver.cuPointerGetAttribute(ctypes.byref(start), 11, last) == 0
    assert driver.cuPointerGetAttribute(ctypes.byref(size), 12, last) == 0
    return start.value, size.value


def test_a_large_tensor_is_one_piece(expandable_segments: bool) -> None:
    # A buffer of several chunks (64 MiB) was registered as the first of them.
    if expandable_segments:
        with pytest.raises(sire.UnsupportedError, match="expandable segments, which PyTorch makes of pieces"):  # noqa: SIM117
            with sire.region("buffers", backup="cpu", whole=True):
                torch.full((150 * MIB,), 7, dtype=torch.uint8, device="cuda")
        return
    with sire.region("chunks", backup="cpu"):
        pieces = torch.full((150 * MIB,), 6, dtype=torch.uint8, device="cuda")
    with sire.region("buffers", backup="cpu", whole=True):
        buffer = torch.full((150 * MIB,), 7, dtype=torch.uint8, device="cuda")
        small = torch.full((1000,), 8, dtype=torch.uint8, device="cuda")
    assert _said_by_the_driver(pieces)[1] <= 64 * MIB
    start, size = _said_by_the_driver(buffer)
    assert start <= buffer.data_ptr()
    assert start + size >= buffer.data_ptr() + buffer.nbytes
    report = sire.pause("buffers")
    assert report.bytes_moved >= 150 * MIB
    sire.resume("buffers")
    assert _said_by_the_driver(buffer) == (start, size)
    assert bool((buffer == 7).all())
    assert bool((small == 8).all())
    del pieces, buffer, small
