"""What is to be done about objects that go away while garbage is collected. That may happen in the middle of anything,
with whatever locks the thread holds, so that nothing is waited for there: a thread of its own does it, or whoever calls
next.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from .._errors import SireError
from .._threads import starting

_here = threading.local()
_starting = threading.RLock()
# Whoever puts something there may be in the middle of doing just that.
_waiting: SimpleQueue[Callable[[], object]] = SimpleQueue()
_process: int | None = None


def get_ready() -> None:
    """Before there is anything that may go away so: from now on it is told from what is let go by hand."""
    global _process, _waiting
    if _process == os.getpid():
        return
    with _starting:
        if _process == os.getpid():
            return
        if _note not in gc.callbacks:
            gc.callbacks.append(_note)
        # A forked child has none of its parent's threads.
        _waiting, _process = SimpleQueue(), os.getpid()
        with suppress(SireError), starting():
            threading.Thread(target=_work, args=(_waiting,), name="sire-collected", daemon=True).start()


def outside_of_collection(action: Callable[[], object]) -> None:
    """Does it now, or, while the calling thread collects garbage, soon."""
    if getattr(_here, "collects", False):
        _waiting.put(action)
    else:
        action()


def catch_up() -> None:
    """Does what nobody has done yet. To be called where others are to make way."""
    with suppress(Empty):
        while True:
            _do(_waiting.get_nowait())


def _note(phase: str, _figures: dict[str, Any]) -> None:
    _here.collects = phase == "start"


def _work(waiting: SimpleQueue[Callable[[], object]]) -> None:
    while True:
        _do(waiting.get())


def _do(action: Callable[[], object]) -> None:
    # Nobody is there to be told.
    with suppress(Exception):
        action()
