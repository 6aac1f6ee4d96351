"""What begins anew in a forked child, which has its parent's objects but none of its threads.

Nothing that is the parent's alone may be used or removed there: its files, its threads' locks, what they had begun.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

_alive: weakref.WeakSet[Any] = weakref.WeakSet()


def join(each: Any) -> None:
    """Its ``begin_anew`` is called in every child that is forked while it lives."""
    _alive.add(each)


def _begin_anew() -> None:
    for each in list(_alive):
        each.begin_anew()


os.register_at_fork(after_in_child=_begin_anew)
