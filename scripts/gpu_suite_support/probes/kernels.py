"""Two kernels in PTX, which the driver itself translates: one that runs for a given time, one that writes a word.

The software device runs no PTX; `Kernels.load` then returns None, and questions fall back to fills.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_uint, c_uint64, c_void_p

from .cuda import Cuda

PTX = b"""
.version 7.0
.target sm_70
.address_size 64

.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .u64 %limit, %start, %now;
    .reg .pred %again;
    ld.param.u64 %limit, [nanoseconds];
    mov.u64 %start, %globaltimer;
LOOP:
    mov.u64 %now, %globaltimer;
    sub.u64 %now, %now, %start;
    setp.lt.u64 %again, %now, %limit;
    @%again bra LOOP;
    ret;
}

.visible .entry store(.param .u64 address, .param .u32 value)
{
    .reg .u64 %where;
    .reg .u32 %what;
    ld.param.u64 %where, [address];
    ld.param.u32 %what, [value];
    st.u32 [%where], %what;
    ret;
}
"""


class Kernels:
    """The loaded module."""

    def __init__(self, cuda: Cuda, spin: c_void_p, store: c_void_p) -> None:
        self._cuda, self._spin, self._store = cuda, spin, store

    @staticmethod
    def load(cuda: Cuda) -> Kernels | None:
        """The kernels, or None where the device cannot run them."""
        module, spin, store = c_void_p(), c_void_p(), c_void_p()
        if cuda.call("cuModuleLoadData", byref(module), PTX) != 0:
            return None
        if cuda.call("cuModuleGetFunction", byref(spin), module, b"spin") != 0:
            return None
        if cuda.call("cuModuleGetFunction", byref(store), module, b"store") != 0:
            return None
        return Kernels(cuda, spin, store)

    def _launch(self, function: c_void_p, stream: c_void_p, *values: ctypes._SimpleCData[int]) -> int:
        pointers = (c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        return self._cuda.call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, stream, pointers, None)

    def spin(self, stream: c_void_p, seconds: float) -> int:
        """Keeps the device busy for `seconds`; returns the driver's number."""
        return self._launch(self._spin, stream, c_uint64(int(seconds * 1e9)))

    def store(self, stream: c_void_p, address: int, value: int) -> int:
        """Writes a word; returns the driver's number."""
        return self._launch(self._store, stream, c_uint64(address), c_uint(value))


def keep_busy(cuda: Cuda, kernels: Kernels | None, stream: c_void_p, seconds: float, address: int, size: int) -> str:
    """Queues about `seconds` of work that touches (at most) `[address, address + size)`; says what it is."""
    if kernels is not None:
        kernels.spin(stream, seconds)
        return f"kernel of {seconds} s"
    import time

    start = time.monotonic()
    cuda.need("cuMemsetD8Async", address, 1, size, stream)
    cuda.need("cuStreamSynchronize", stream)
    one = max(time.monotonic() - start, 1e-5)
    count = max(4, min(2000, int(seconds / one)))
    for _ in range(count):
        cuda.need("cuMemsetD8Async", address, 1, size, stream)
    return f"{count} fills, about {count * one:.2f} s"
