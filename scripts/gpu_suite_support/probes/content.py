"""Device content that can be verified byte for byte: blocks of a random pattern, each with its own number in front."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from .cuda import MIB, Cuda

BLOCK = 32 * MIB

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


Block = tuple[int, tuple[int, int]]


class _Pair:
    """One thread's two pinned blocks: what is expected, and what was found."""

    def __init__(self, cuda: Cuda, pattern: bytes) -> None:
        self._cuda = cuda
        self.expected, self._found = cuda.host(BLOCK), cuda.host(BLOCK)
        ctypes.memmove(self.expected, pattern, BLOCK)

    def number(self, number: int) -> None:
        ctypes.memmove(self.expected, number.to_bytes(16, "little"), 16)

    def wrong(self, blocks: Iterable[Block]) -> list[int]:
        """Numbers of those that hold something else. In a thread of its own: the driver and `memcmp` let others run."""
        if self._cuda.context is not None:
            self._cuda.need("cuCtxSetCurrent", self._cuda.context)
        return [number for number, place in blocks if self._differs(number, *place)]

    def _differs(self, number: int, address: int, length: int) -> bool:
        self.number(number)
        self._cuda.need("cuMemcpyDtoH_v2", self._found, address, length)
        return bool(_memcmp(self._found, self.expected, length) != 0)


class Content:
    """Writes allocations, and verifies them in as many threads as told."""

    def __init__(self, cuda: Cuda, workers: int = 1) -> None:
        self._cuda = cuda
        pattern = random.Random(5).randbytes(BLOCK)
        self._pairs = [_Pair(cuda, pattern) for _ in range(workers)]

    def write(self, allocations: list[int], size: int) -> None:
        """Fills every allocation of `size` bytes."""
        pair = self._pairs[0]
        for number, (address, length) in self._blocks(allocations, size):
            pair.number(number)
            self._cuda.need("cuMemcpyHtoD_v2", address, pair.expected, length)
        self._cuda.need("cuCtxSynchronize")

    def wrong_blocks(self, allocations: list[int], size: int) -> list[int]:
        """Numbers of the blocks that do not hold what `write` put there."""
        blocks, count = self._blocks(allocations, size), len(self._pairs)
        shares = [blocks[index::count] for index in range(count)]
        with ThreadPoolExecutor(count) as pool:
            return sorted(number for found in pool.map(_Pair.wrong, self._pairs, shares) for number in found)

    @staticmethod
    def _blocks(allocations: list[int], size: int) -> list[Block]:
        places = [(address + offset, min(BLOCK, size - offset)) for address in allocations for offset in range(0, size, BLOCK)]
        return list(enumerate(places))
