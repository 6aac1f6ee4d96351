"""Calls of modules that manage themselves, by thread, while they are under way.

PyTorch tells the end of a call also where it raised an `Exception`, but not where Ctrl-C, `SystemExit` or a cancelled
task ended it. Such a call is known by the thread's stack, on which no module's call is any more, and is ended then.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import Any

_here = threading.local()


class Call:
    """A call of a module; ``entered`` while it uses the module."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.entered = False

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
        with suppress(Exception):
            self.abandon()


def _calls() -> list[Call]:
    calls: list[Call] = _here.__dict__.setdefault("calls", [])
    return calls


def begin(call: Call) -> None:
    """The thread enters a call."""
    _calls().append(call)


def end(owner: Any) -> Call | None:
    """The innermost call of this owner is over, and with it those inside that ended without a word."""
    calls = _calls()
    while any(each.owner is owner for each in calls):
        call = calls.pop()
        if call.owner is owner:
            return call
        call.abandon()
    return None


def abandon_ended() -> None:
    """Ends the thread's calls that ended without a word. To be called where a use begins, or others are to make way."""
    calls = _calls()
    entering = [each for each in calls if not each.entered]
    if len(calls) > len(entering) and _modules_on_the_stack() == len(entering):
        ended = [each for each in calls if each.entered]
        calls[:] = entering
        for call in reversed(ended):
            call.abandon()


def _modules_on_the_stack() -> int:
    """Calls of modules on this thread's stack; -1 where a compiler has taken frames apart: it cannot be said."""
    import torch

    found, frame = 0, sys._getframe(1)
    called = torch.nn.Module._call_impl.__code__
    while frame is not None:
        if frame.f_code.co_name.startswith("torch_dynamo_resume"):
            return -1
        found += frame.f_code is called
        frame = frame.f_back  # type: ignore[assignment]
    return found
