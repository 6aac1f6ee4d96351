"""Threads that a call of the program's starts: one that cannot be started is an error of the package's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ._errors import SireError


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of a thread, and of nothing else: at the process's limit of threads, and when the interpreter
    ends, it raises `SireError`. What was done before is the caller's to undo.
    """
    try:
        yield
    except RuntimeError as error:
        raise SireError(
            f"this process cannot start another thread: {error}. End others, or raise the limit (ulimit -u, a "
            "container's limit of processes), and repeat the call"
        ) from error
