"""A fresh process for a probe, which runs the program's own file again only if the probe is made of something that
is defined in there. A file that reserves and trains at its top level would do that in every fresh process.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Held while the program looks as if it had no file.
_HIDING = threading.Lock()


def start(child: Any, task: object) -> bool:
    """Starts ``child``, which is to unpickle ``task``; returns whether it runs the program's file again."""
    again = mentions_program(task)
    with contextlib.nullcontext() if again else _no_file():
        child.start()
    return again


def mentions_program(task: object) -> bool:
    """Whether something in ``task`` is defined in the program's own file, or cannot be looked through."""
    search = _Search()
    try:
        search.dump(task)
    except Exception:
        # Whoever sends it in earnest says what is wrong with it.
        return True
    return search.found


class _Nothing:
    """A file that keeps nothing."""

    def write(self, data: bytes, /) -> int:
        return len(data)


class _Search(pickle.Pickler):
    """Goes where a pickler goes, and writes nothing."""

    def __init__(self) -> None:
        super().__init__(_Nothing())
        self.found = False

    def persistent_id(self, value: Any) -> str | None:
        if getattr(value, "__module__", None) == "__main__":
            self.found = True
        # What a tensor holds is sent in its own way, and is nothing but numbers.
        return "a tensor" if hasattr(value, "data_ptr") else None


@contextlib.contextmanager
def _no_file() -> Iterator[None]:
    """The program has no file, as one that was typed in; else `multiprocessing` has a fresh process run it."""
    program: dict[str, Any] = vars(sys.modules["__main__"])
    with _HIDING:
        kept: dict[str, Any] = {name: program[name] for name in ("__file__", "__spec__") if name in program}
        program.update(dict.fromkeys(kept))
        try:
            yield
        finally:
            program.update(kept)
