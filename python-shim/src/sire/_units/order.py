"""In which order units are used, learned while they are, and what that says about who is needed next.

A name follows the two before it: after ``(a, b)`` came ``c``, so it will again. That tells a forward pass from the
backward pass over the same layers, and costs one dictionary entry per step. Pure and without locks; `residency` brings
the lock.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
_OTHER_CONTEXTS = 100_000


class UseOrder(Generic[Name]):
    """What was used after what."""

    def __init__(self) -> None:
        self._after: dict[tuple[Name | None, Name | None], Name] = {}
        self._last: tuple[Name | None, Name | None] = (None, None)

    def used(self, name: Name) -> None:
        """``name`` is used now. Using the same twice in a row counts once."""
        if name == self._last[1]:
            return
        if len(self._after) > _OTHER_CONTEXTS:
            self._after.clear()
        self._after[self._last] = name
        self._last = (self._last[1], name)

    def forget(self, name: Name) -> None:
        """``name`` will not be used any more."""
        self._after = {key: after for key, after in self._after.items() if name not in (*key, after)}

    def upcoming(self, limit: int) -> list[Name]:
        """What is expected next, soonest first: at most ``limit`` different names; it ends where nothing is known."""
        found: dict[Name, None] = {}
        at, seen = self._last, set()
        while len(found) < limit and at in self._after and at not in seen:
            seen.add(at)
            name = self._after[at]
            found.setdefault(name)
            at = (at[1], name)
        return list(found)


@dataclass(frozen=True)
class Standing:
    """What is known of one candidate for leaving: ``idle`` seconds since its last use, and how often it was used."""

    idle: float
    uses: int = 0
    priority: int = 0


def leaving_order(
    candidates: Mapping[Name, Standing], upcoming: Iterable[Name], idle_threshold: float = float("inf")
) -> list[Name]:
    """Who goes first: low priority before high; what is not expected before what is, idle ones and then the least
    recently used first; of what is expected, what is needed last goes first.

    For a loop over more units than fit, least-recently-used throws out exactly what is needed next; this does not.
    """
    needed = {name: position for position, name in enumerate(upcoming)}

    def key(name: Name) -> tuple[int, bool, float, bool, float]:
        it = candidates[name]
        return (it.priority, name in needed, -needed.get(name, 0), it.idle < idle_threshold, -it.idle)

    return sorted(candidates, key=key)


def usage_order(candidates: Mapping[Name, Standing], upcoming: Iterable[Name]) -> list[Name]:
    """As `leaving_order`, where of what is not expected the rarely used goes first: uses per second of idleness."""
    needed = {name: position for position, name in enumerate(upcoming)}

    def key(name: Name) -> tuple[int, bool, float, float]:
        it = candidates[name]
        return (it.priority, name in needed, -needed.get(name, 0), it.uses / (1.0 + it.idle))

    return sorted(candidates, key=key)
