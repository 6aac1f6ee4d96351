"""Which address ranges belong to tags, whether their segments hold anything, and subtraction of ranges.

Who knows it depends on the hook mode: PyTorch of the pools that regions have, the library of its own cache where it
is the whole process's allocator.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import _library, _torch
from .._blocks import Ranges

IsWanted = Callable[[str], bool]


def of_tags(wanted: IsWanted) -> Ranges:
    """The segments that PyTorch's tensors of these tags were cut from."""
    found = [
        (int(each["address"]), int(each["total_size"]))
        for each in _library.load().memory_snapshot()
        if wanted(str(each.get("tag")))
    ]
    torch = _torch.cuda_in_use()
    for key, shelf in _torch.shelves() if torch is not None else []:
        if wanted(str(key[0])):
            for identity in _torch.identities(shelf):
                found += [(int(each["address"]), int(each["total_size"])) for each in _torch.segments(torch, identity)]
    return found


def return_free(wanted: IsWanted) -> None:
    """Pools of these tags that hold more wholly free segments than free blocks elsewhere are dropped.

    Their free segments go to the driver, their tensors live on.
    """
    torch = _torch.cuda_in_use()
    if torch is None or _torch.capturing():
        return
    if _torch.whole_process_pluggable(torch):
        _library.load().empty_cache()
        return
    for key, shelf in _torch.shelves():
        for pool in _torch.pools(shelf) if wanted(str(key[0])) else []:
            segments = _torch.segments(torch, pool.identity)
            free = sum(each["total_size"] for each in segments if each["active_size"] == 0)
            partly = sum(each["total_size"] - each["active_size"] for each in segments if each["active_size"])
            live_expandable = any(each["is_expandable"] and each["active_size"] for each in segments)
            if free and free >= partly and not live_expandable:
                _torch.retire(torch, key, pool)


def without(ranges: Ranges, kept: Ranges) -> Ranges:
    """``ranges`` less the bytes of ``kept``; both are (start, size), in any order, and may overlap."""
    for start, size in kept:
        ranges = [piece for each in ranges for piece in _cut(each, start, start + size)]
    return ranges


def _cut(whole: tuple[int, int], start: int, end: int) -> Ranges:
    first, last = whole[0], whole[0] + whole[1]
    if end <= first or last <= start:
        return [whole]
    pieces = [(first, start - first), (end, last - end)]
    return [(at, size) for at, size in pieces if size > 0]
