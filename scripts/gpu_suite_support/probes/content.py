"""Device content that can be verified byte for byte: blocks of a random pattern, each with its own number in front."""

from __future__ import annotations

import ctypes
import random

from .cuda import MIB, Cuda

BLOCK = 32 * MIB

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Content:
    """Writes and verifies allocations through two pinned blocks."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._expected, self._found = cuda.host(BLOCK), cuda.host(BLOCK)
        ctypes.memmove(self._expected, random.Random(5).randbytes(BLOCK), BLOCK)

    def _number(self, number: int) -> None:
        ctypes.memmove(self._expected, number.to_bytes(16, "little"), 16)

    def write(self, allocations: list[int], size: int) -> None:
        """Fills every allocation of `size` bytes."""
        for number, (address, length) in enumerate(self._blocks(allocations, size)):
            self._number(number)
            self._cuda.need("cuMemcpyHtoD_v2", address, self._expected, length)
        self._cuda.need("cuCtxSynchronize")

    def wrong_blocks(self, allocations: list[int], size: int) -> list[int]:
        """Numbers of the blocks that do not hold what `write` put there."""
        wrong = []
        for number, (address, length) in enumerate(self._blocks(allocations, size)):
            self._number(number)
            self._cuda.need("cuMemcpyDtoH_v2", self._found, address, length)
            if _memcmp(self._found, self._expected, length) != 0:
                wrong.append(number)
        return wrong

    @staticmethod
    def _blocks(allocations: list[int], size: int) -> list[tuple[int, int]]:
        return [(address + offset, min(BLOCK, size - offset)) for address in allocations for offset in range(0, size, BLOCK)]
