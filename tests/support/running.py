"""Other programs in tests: each ends with its block at the latest, and after a time limit, so that no test waits for ever for one that hangs."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

LIMIT = 240.0
"""Seconds. Far more than any of them takes, also on a busy machine."""


def end(process: subprocess.Popen[str]) -> None:
    """Kills it, unless it has ended, and takes it away."""
    process.kill()
    process.wait(LIMIT)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def running(command: Sequence[str | Path], limit: float = LIMIT, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The program, as `subprocess.Popen` starts it. After so many seconds it is killed: whoever reads what it says then meets its end."""
    process: subprocess.Popen[str] = subprocess.Popen([str(part) for part in command], text=True, **options)
    timer = threading.Timer(limit, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        end(process)


def line(process: subprocess.Popen[str]) -> str:
    """The next line that it says, without its end; empty if there is none."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def until(what: str, true: Callable[[], bool], limit: float = 60.0) -> None:
    """Waits for it, for as long as a busy machine may take."""
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end, f"it never came true: {what}"
        time.sleep(0.01)
