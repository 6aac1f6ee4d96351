"""vLLM's own allocator, which must not be reached once Sire's is in its place."""

from __future__ import annotations


class CuMemAllocator:
    @staticmethod
    def get_instance() -> CuMemAllocator:
        return CuMemAllocator()
