"""Runs a child process under a time limit, in its own process group, and returns what came of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    status: int
    timed_out: bool
    output: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it exited with 0 in time."""
        return self.status == 0 and not self.timed_out

    def how(self) -> str:
        """The end in words."""
        if self.timed_out:
            return f"stopped after {self.seconds:.0f} s without an end"
        if self.status < 0:
            return f"died of {_signal_name(-self.status)}"
        return f"exited with {self.status}"

    def tail(self, lines: int = 15) -> str:
        """The end and the last lines of what it printed."""
        last = "\n".join(self.output.strip().splitlines()[-lines:])
        return f"{self.how()}\n{last}".strip()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a child and everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(command: Sequence[str], *, env: Mapping[str, str], timeout: float, cwd: Path | None = None) -> Outcome:
    """Runs `command` to its end or for `timeout` seconds. Never raises for what the child does."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(127, False, str(error), time.monotonic() - start)
        timed_out = False
        try:
            process.wait(timeout=max(timeout, 0.1))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            stop_group(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Outcome(process.returncode, timed_out, text, time.monotonic() - start)


def last_json(text: str) -> dict[str, Any] | None:
    """The last line of `text` that is a JSON object: how probes hand back their result."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict):
                return found
    return None
