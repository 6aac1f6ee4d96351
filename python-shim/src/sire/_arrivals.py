"""Bytes on their way to a device: copied on a stream of their own, and waited for by streams, not by their callers.

Whoever begins a copy may be gone before it is over, so host memory that copies read from is kept here until then.
"""

from __future__ import annotations

import atexit
import threading
from contextlib import suppress
from typing import Any

from . import _torch

_streams: dict[int, Any] = {}
_making = threading.Lock()
# Of each arrival that is not known to be over, its event and the memory that is read. No lock: single operations of a
# dictionary, because an arrival may be collected anywhere.
_under_way: dict[int, tuple[Any, list[Any]]] = {}


def copy_stream(torch: Any, index: int) -> Any:
    """The stream of this process on which bytes arrive early on a device; one, so that they arrive in order."""
    with _making:
        if index not in _streams:
            _streams[index] = torch.cuda.Stream(index)
        return _streams[index]


class Arrival:
    """All that a stream of a device was given until now: the copy stream, if none is named. ``source`` is kept until
    that is over, also if the arrival itself is not.
    """

    def __init__(self, torch: Any, index: int, source: list[Any], stream: Any = None) -> None:
        _forget_those_that_are_over()
        self._torch = torch
        self._index = index
        self._event = torch.cuda.Event()
        self._event.record(copy_stream(torch, index) if stream is None else stream)
        _under_way[id(self._event)] = (self._event, source)

    def __del__(self) -> None:
        # Not waited for here: what is not over is let go of when another one begins.
        with suppress(Exception):
            if not _torch.capturing():
                _ = self.over

    @property
    def over(self) -> bool:
        """Whether the bytes are there."""
        over = bool(self._event.query())
        if over:
            _under_way.pop(id(self._event), None)
        return over

    def order(self) -> None:
        """The caller's stream goes on when they are there; the caller goes on now."""
        if not _torch.capturing():
            self._torch.cuda.current_stream(self._index).wait_event(self._event)

    def synchronize(self) -> None:
        """The caller goes on when they are there."""
        self._event.synchronize()
        _under_way.pop(id(self._event), None)


def _forget_those_that_are_over() -> None:
    for key, (event, _) in list(_under_way.items()):
        if event.query():
            _under_way.pop(key, None)


@atexit.register
def _wait_for_all() -> None:
    """Before the interpreter takes the memory away."""
    for event, _ in list(_under_way.values()):
        with suppress(Exception):
            event.synchronize()
