"""Time limits: a figure that takes too long, or a run that somebody ends, leaves no process behind, and what was measured before counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


class OutOfTime(Exception):
    """A group of figures has run out of its time."""


class Ended(BaseException):
    """Somebody has ended the run (Ctrl-C, or SIGTERM)."""


def parents() -> dict[int, int]:
    """Every process and whose child it is."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue  # It has ended meanwhile.
    return found


def descendants() -> list[int]:
    """What this process has started, and what that has."""
    table, found = parents(), [os.getpid()]
    for parent in found:
        found += [pid for pid, of in table.items() if of == parent and pid not in found]
    return found[1:]


def end_descendants() -> None:
    """Before anybody unwinds: the children of a process that is gone could not be found any more."""
    # Stopped until there are no new ones, so that nobody starts another one meanwhile.
    stopped: set[int] = set()
    while new := set(descendants()) - stopped:
        _send(new, signal.SIGSTOP)
        stopped |= new
    _send(stopped, signal.SIGKILL)


def _send(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(OSError):  # It has ended meanwhile.
            os.kill(pid, number)


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    end_descendants()
    raise OutOfTime


def _ended(_number: int, _frame: FrameType | None) -> None:
    # One is enough: what follows is the report.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_descendants()
    raise Ended


def watch() -> None:
    """From now on an end from outside is `Ended`, with no process left."""
    signal.signal(signal.SIGINT, _ended)
    signal.signal(signal.SIGTERM, _ended)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """`OutOfTime` when the time is over, with no process left. Main thread only."""
    before = signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
