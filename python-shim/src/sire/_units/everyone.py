"""All residencies of this process, for whoever looks from outside: what units there are, where, what happened to them.

Not held by this: a residency that nobody uses any more is not shown any more.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .residency import Residency

_lock = threading.Lock()
_numbers = itertools.count(1)
_alive: weakref.WeakKeyDictionary[Residency, int] = weakref.WeakKeyDictionary()


def join(residency: Residency) -> None:
    """It is shown from now on, as long as it lives."""
    with _lock:
        _alive[residency] = next(_numbers)


def standing() -> list[dict[str, Any]]:
    """Of each unit: ``of`` (whose it is), ``name``, ``tier``, ``bytes``, ``uses``, as plain values."""
    return [{"of": f"{each.kind} {number}", **unit} for each, number in _listed() for unit in each.standing()]


def events(most: int) -> list[dict[str, Any]]:
    """What happened to units last, the oldest first, in the form of the events of models."""
    found = [event for each, _ in _listed() for event in each.events()[-most:]]
    found.sort(key=lambda event: event.time)
    return [
        {"time": each.time, "kind": each.what, "name": each.unit, "bytes": each.bytes, "detail": each.note}
        for each in found[-most:]
    ]


def _listed() -> list[tuple[Residency, int]]:
    with _lock:
        return sorted(_alive.items(), key=lambda each: each[1])
