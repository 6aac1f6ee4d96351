"""What happened to managed objects: the last events, and sums of all."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass

_KEPT = 4096


@dataclass(frozen=True)
class Event:
    """Something that happened to an object."""

    time: float
    """Seconds since the epoch."""
    kind: str
    """``"load"``, ``"hit"`` (its memory was still there), ``"offload"``, ``"evict"``, ``"wait"`` or ``"fail"``."""
    name: str
    """The object's tag, or its type."""
    bytes: int = 0
    """Bytes of the device that it is about."""
    copied: int = 0
    """Bytes that were copied between host and device."""
    seconds: float = 0.0
    """How long it took."""
    detail: str = ""
    """Why, where that is not plain."""


class Log:
    """The last events of a process, the oldest first, and how many there were of each kind."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._counts: Counter[str] = Counter()
        self._copied = 0
        # Reentrant: a use may end, and be noted, in the thread that reads, when what it lasted for is collected.
        self._lock = threading.RLock()

    def add(
        self, kind: str, name: str, size: int = 0, *, copied: int = 0, seconds: float = 0.0, detail: str = ""
    ) -> None:
        """Notes an event."""
        event = Event(time.time(), kind, name, size, copied, seconds, detail)
        with self._lock:
            self._events.append(event)
            self._counts[kind] += 1
            self._copied += copied

    def events(self) -> list[Event]:
        """The last events."""
        with self._lock:
            return list(self._events)

    def totals(self) -> dict[str, int]:
        """How many events of each kind there were, and bytes copied."""
        with self._lock:
            return {**self._counts, "bytes_copied": self._copied}


log = Log()


def events() -> list[Event]:
    """The last events of managed objects, the oldest first: loads, offloads, evictions, waits, failures."""
    return log.events()
