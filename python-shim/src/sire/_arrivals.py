"""Bytes on their way to a device: copied on a stream of their own, and waited for by streams, not by their callers."""

from __future__ import annotations

import threading
from typing import Any

from . import _torch

_streams: dict[int, Any] = {}
_making = threading.Lock()


def copy_stream(torch: Any, index: int) -> Any:
    """The stream of this process on which bytes arrive early on a device; one, so that they arrive in order."""
    with _making:
        if index not in _streams:
            _streams[index] = torch.cuda.Stream(index)
        return _streams[index]


class Arrival:
    """All that the copy stream of a device was given until now."""

    def __init__(self, torch: Any, index: int) -> None:
        self._torch = torch
        self._index = index
        self._event = torch.cuda.Event()
        self._event.record(copy_stream(torch, index))

    @property
    def over(self) -> bool:
        """Whether the bytes are there."""
        return bool(self._event.query())

    def order(self) -> None:
        """The caller's stream goes on when they are there; the caller goes on now."""
        if not _torch.capturing():
            self._torch.cuda.current_stream(self._index).wait_event(self._event)

    def synchronize(self) -> None:
        """The caller goes on when they are there."""
        self._event.synchronize()
