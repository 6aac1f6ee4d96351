"""What PyTorch's cache holds free in the pools of regions: left out at a pause, or given back where memory is short.

PyTorch gets segments from the library and cuts them into blocks. Only PyTorch knows which blocks are free, so at
a pause the library asks, when the regions are closed and nobody can take a block of theirs. A free block is neither
copied nor restored; one that waits for a stream (pending free) still counts as live. Segments in which every block is
free go back to the driver: their pool is dropped and a new one takes its place, where that leaves less free memory
behind than it gives back.

Taking the map costs about 4 microseconds per block. Where that is more than the copies it can save, it is
not taken, and the report says so. In regions whose content is in files every free byte counts, down to what PyTorch
rounds up: each would be all that needs host memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import _hooks, _library, _torch

_SECONDS_PER_BLOCK = 4e-6
_COPIED_PER_SECOND = 12e9
# Less free memory than this is not worth asking about, or giving back.
_WORTH_ASKING = 1 << 20
_WORTH_RETURNING = 16 << 20
# The library copies smaller holes along with what is around them.
_SMALLEST_HOLE = 64 << 10

Ranges = list[tuple[int, int]]


@dataclass
class BlockMap:
    """Answers the library's question during one pause; `notes` say what it did not do."""

    torch: Any
    notes: list[str] = field(default_factory=list)

    def __call__(self, regions: list[int]) -> Ranges:
        """Free memory in the pools of these regions, which are closed."""
        try:
            return self._taken(regions)
        except Exception as error:  # a PyTorch that answers otherwise costs the gain, not the pause
            self.notes.append(f"free blocks were copied too: PyTorch's map of its blocks could not be read ({error!r})")
            return []

    def _taken(self, regions: list[int]) -> Ranges:
        shelves = _saving_shelves(regions)
        dead = self._default_pool(regions)
        in_files = [(key, shelf) for key, shelf in shelves if key[1].in_files]
        others = [(key, shelf) for key, shelf in shelves if not key[1].in_files]
        if others and not self._is_worth_it(sorted({key[-1] for key, _ in others})):
            others = []
        for key, shelf in others + in_files:
            for pool in _torch.pools(shelf):
                _return_free_segments(self.torch, key, pool, _WORTH_RETURNING)
            dead += self._free_blocks(shelf, exact=key[1].in_files)
        return dead

    def _default_pool(self, regions: list[int]) -> Ranges:
        """Free memory of PyTorch's own pool, where it lies in the process-wide region."""
        if not _hooks.preloaded() or _library.load().region_current() not in regions:
            return []
        devices = list(range(self.torch.cuda.device_count()))
        if not self._is_worth_it(devices):
            return []
        library, dead = _library.load(), []
        for segment in _torch.segments(self.torch, _DEFAULT_POOL):
            if tuple(segment["segment_pool_id"]) == _DEFAULT_POOL and library.owns(int(segment["address"])):
                dead += _holes(segment)
        return dead

    def _is_worth_it(self, devices: list[int]) -> bool:
        """Two upper bounds, of the gain and of the cost, from PyTorch's counters, which know devices, not pools."""
        free = blocks = 0
        for device in devices:
            stats = self.torch._C._cuda_memoryStats(device)
            current = {name: stats[name]["all"]["current"] for name in _COUNTERS}
            free += current["reserved_bytes"] - current["active_bytes"]
            blocks += current["active"] + current["inactive_split"] + current["segment"]
        if free < _WORTH_ASKING:
            return False
        cost, gain = blocks * _SECONDS_PER_BLOCK, free / _COPIED_PER_SECOND
        if cost > gain:
            self.notes.append(
                f"free blocks were copied too: a map of the {blocks} blocks in PyTorch's cache would take about "
                f"{cost * 1e3:.1f} ms, copying the {free} bytes that are free takes {gain * 1e3:.1f} ms at most"
            )
        return cost <= gain

    def _free_blocks(self, shelf: _torch.Shelf, exact: bool) -> Ranges:
        dead: Ranges = []
        for identity in _torch.identities(shelf):
            segments = _torch.segments(self.torch, identity)
            if not segments:
                _torch.forget(shelf, identity)
            for segment in segments:
                dead += _every_hole(segment) if exact else _holes(segment)
        return dead


_DEFAULT_POOL = (0, 0)
_COUNTERS = ("reserved_bytes", "active_bytes", "active", "inactive_split", "segment")


def _saving_shelves(regions: list[int]) -> list[tuple[_torch.PoolKey, _torch.Shelf]]:
    """The pools of those regions that have a backup."""
    library, wanted = _library.load(), set(regions)
    found = []
    for key, shelf in _torch.shelves():
        tag, policy = key[0], key[1]
        if policy.backup and library.region_open(str(tag).encode(), *policy.fields()) in wanted:
            found.append((key, shelf))
    return found


def _is_free(segment: dict[str, Any]) -> bool:
    return bool(segment["active_size"] == 0)


def _holes(segment: dict[str, Any]) -> Ranges:
    """Free blocks, with neighbours joined."""
    holes: Ranges = []
    at = int(segment["address"])
    for block in segment["blocks"]:
        size = int(block["size"])
        if block["state"] == "inactive":
            if holes and holes[-1][0] + holes[-1][1] == at:
                holes[-1] = (holes[-1][0], holes[-1][1] + size)
            else:
                holes.append((at, size))
        at += size
    return [hole for hole in holes if hole[1] >= _SMALLEST_HOLE]


def _every_hole(segment: dict[str, Any]) -> Ranges:
    """Free blocks, and what lies between the end of a tensor and the end of its block."""
    holes: Ranges = []
    at = int(segment["address"])
    for block in segment["blocks"]:
        size = int(block["size"])
        used = int(block.get("requested_size", size)) if block["state"] == "active_allocated" else size
        used = 0 if block["state"] == "inactive" else used
        if used < size:
            holes.append((at + used, size - used))
        at += size
    return holes


def _return_free_segments(torch: Any, key: _torch.PoolKey, pool: _torch.Pool, worth: int) -> None:
    """Drops a pool that gives back at least ``worth`` bytes, and leaves no more free memory behind."""
    segments = _torch.segments(torch, pool.identity)
    wholly = sum(each["total_size"] for each in segments if _is_free(each))
    partly = sum(each["total_size"] - each["active_size"] for each in segments if not _is_free(each))
    if any(each["is_expandable"] and not _is_free(each) for each in segments):
        # PyTorch may free them twice if their pool goes before their tensors.
        return
    if wholly >= max(worth, partly):
        _torch.retire(torch, key, pool)


def empty_cache() -> int:
    """Gives the driver what PyTorch only caches, also in pools of regions that no thread is in; how many bytes."""
    torch = _torch.cuda_in_use()
    if torch is None or _torch.capturing() or _torch.whole_process_pluggable(torch):
        return 0
    before = _reserved(torch)
    # First what was dropped before, and blocks that a stream has done with: these count as used until somebody looks.
    torch.cuda.empty_cache()
    for key, shelf in _torch.shelves():
        for pool in _torch.pools(shelf):
            _return_free_segments(torch, key, pool, worth=1)
    return max(0, before - _reserved(torch))


def _reserved(torch: Any) -> int:
    return sum(int(torch.cuda.memory_reserved(device)) for device in range(torch.cuda.device_count()))


def block_map() -> BlockMap | None:
    """The map for a pause; None where PyTorch has no memory of ours."""
    torch = _torch.cuda_in_use()
    if torch is None or not (_torch.shelves() or _hooks.preloaded()):
        return None
    return BlockMap(torch)
