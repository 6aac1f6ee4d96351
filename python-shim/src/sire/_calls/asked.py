"""What the library asks back while a call runs, as functions that C can call; what an answer raises is kept for the
caller, and refuses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER
from typing import Any

from .. import _interface, _interrupt

Ranges = list[tuple[int, int]]
"""Address and bytes of each."""
DeadRanges = Callable[[list[int]], Ranges]
"""Which memory of regions, given by number, holds nothing."""
Told = Callable[[int, "str | None"], bool]
"""Hears what happens to a tag (None: everything): 0 before a pause, which false refuses; 1 after a resume; 2 when
nothing was paused after all."""

_CANCELLED = 9


def array(ranges: Ranges) -> Any:
    """Ranges as C has them."""
    return (_interface.Range * len(ranges))(*(_interface.Range(start, size) for start, size in ranges))


def hearing(told: Told | None, raised: list[BaseException]) -> Any:
    """The function for the library; what ``told`` raises is kept in ``raised``, and refuses."""
    if told is None:
        return _interface.ToldCallback()

    def hear(_context: Any, what: int, tag: bytes | None) -> int:
        try:
            with _interrupt.undeferred():
                return 0 if told(what, None if tag is None else tag.decode()) else _CANCELLED
        except BaseException as error:
            raised.append(error)
            return _CANCELLED

    return _interface.ToldCallback(hear)


class Asked:
    """A `DeadRanges` as C calls it; `error` is what it raised."""

    def __init__(self, answer: DeadRanges | None) -> None:
        self.error: BaseException | None = None
        self._answer = answer
        self._ranges: Any = None
        self.function = _interface.DeadRangesCallback() if answer is None else _interface.DeadRangesCallback(self._call)

    def _call(self, _context: Any, regions: Any, count: int, out_ranges: Any, out_count: Any) -> int:
        try:
            found = [] if self._answer is None else self._answer(regions[:count])
            # Kept until the pause returns.
            self._ranges = array(found)
            out_ranges[0] = ctypes.cast(self._ranges, POINTER(_interface.Range))
            out_count[0] = len(found)
        except BaseException as error:
            self.error = error
            return _CANCELLED
        return 0
