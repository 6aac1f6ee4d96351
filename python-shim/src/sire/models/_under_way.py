"""Calls of modules that manage themselves, by thread, while they are under way.

PyTorch tells the end of a call also where it raised an `Exception`, but not where Ctrl-C, `SystemExit` or a cancelled
task ended it. Such a call is known by the thread's stack: fewer modules' calls are on it than when it began, or as many
for another one that begins. It is ended then.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import Any

from ._collected import outside_of_collection

_here = threading.local()


class Call:
    """A call of a module; ``entered`` while it uses the module. ``by_hand``: PyTorch does not make it, so that it is
    not on the stack itself. ``lasts``: such a one that somebody will end, too.
    """

    def __init__(self, owner: Any, by_hand: bool, lasts: bool) -> None:
        self.owner = owner
        self.by_hand, self.lasts = by_hand, lasts
        self.entered = False
        self.depth = 0 if lasts else 1

    def end_use(self) -> None:
        """Its use of the module is over."""
        raise NotImplementedError

    def abandon(self) -> None:
        """It ended without a word."""
        entered, self.entered = self.entered, False
        if entered:
            self.end_use()

    def __del__(self) -> None:
        # Its thread has ended.
        entered, self.entered = self.entered, False
        if entered:
            with suppress(Exception):
                outside_of_collection(self.end_use)


def _calls() -> list[Call]:
    calls: list[Call] = _here.__dict__.setdefault("calls", [])
    return calls


def begin(call: Call) -> None:
    """The thread enters a call."""
    depth = _depth()
    if depth is not None:
        around = depth if call.by_hand else depth - 1
        _abandon(around)
        call.depth = around if call.lasts else around + 1
    _calls().append(call)


def end(owner: Any, by_hand: bool) -> Call | None:
    """The innermost call of this owner that PyTorch makes, or that is made by hand, is over, and with it those inside
    that ended without a word.
    """
    calls = _calls()
    mine = [at for at, each in enumerate(calls) if each.owner is owner and each.by_hand is by_hand]
    at = mine[-1] if mine else None
    if at is None:
        return None
    call, inside = calls[at], calls[at + 1 :]
    calls[at:] = [each for each in inside if each.lasts]
    for each in reversed(inside):
        if not each.lasts:
            each.abandon()
    return call


def abandon_ended() -> None:
    """Ends the thread's calls that ended without a word. To be called where a use begins, or others are to make way."""
    depth = _depth() if any(each.entered for each in _calls()) else None
    if depth is not None:
        _abandon(depth)


def _abandon(depth: int) -> None:
    """Ends calls that began deeper."""
    calls = _calls()
    ended = [each for each in calls if each.entered and each.depth > depth]
    calls[:] = [each for each in calls if each not in ended]
    for call in reversed(ended):
        call.abandon()


def _depth() -> int | None:
    """Calls of modules on this thread's stack; None where a compiler has taken frames apart, so that nobody knows."""
    import torch

    found, frame = 0, sys._getframe(1)
    called = torch.nn.Module._call_impl.__code__
    while frame is not None:
        code = frame.f_code
        if code.co_name.startswith("torch_dynamo_resume"):
            return None
        # A compiler's version of the function has its name.
        found += code.co_name == called.co_name and code.co_filename == called.co_filename
        frame = frame.f_back  # type: ignore[assignment]
    return found
