"""Finds what failed in a log of cargo or pytest.

`failures.py LOG` prints, for every failed test, its name and the line at which it failed; `failures.py --names LOG` the
names alone. Logs are long and a failure is rarely at their end: scripts/test prints this before it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

BINARY = re.compile(r"^\s+(?:Running (?:unittests )?(\S+)|Doc-tests (\S+))")
LISTED = re.compile(r"^ {4}(\S.*)$")
PANIC = re.compile(r"^thread '(.*)' (?:\(\d+\) )?panicked at (.+):$")
# What pytest expected and got, also where a test shows the output of a pytest that it ran.
EXPECTED = re.compile(r"^(?:E {3}|> {2,}|E {3,}[E>] {2,})\S")
PYTEST = re.compile(r"^(?:FAILED|ERROR) (\S.*)$")
DIED = re.compile(r"^(?:error(?:\[E\d+\])?: |\s*process didn't exit successfully|Diff in |timeout: )")
PLACE = re.compile(r"^\s+--> \S+:\d+")

TELLING = (PANIC, EXPECTED, PYTEST, DIED, PLACE)


def names(log: str) -> list[str]:
    """The failed tests, each once, with the file that cargo says it is in."""
    found: dict[str, None] = {}
    binary, listing = "", False
    for line in log.splitlines():
        if running := BINARY.match(line):
            binary = running[1] or running[2]
        if line == "failures:":
            listing = True
        elif listing and (listed := LISTED.match(line)):
            found[f"{binary}::{listed[1]}" if binary else listed[1]] = None
        elif line:
            listing = False
        if reported := PYTEST.match(line):
            found[reported[1].split(" - ")[0]] = None
    return list(found)


def telling(lines: Iterable[str]) -> Iterator[str]:
    """The lines that say what failed and where, with the first line of each panic's message."""
    message_follows = False
    for line in lines:
        if message_follows or any(pattern.match(line) for pattern in TELLING):
            yield line
        message_follows = bool(PANIC.match(line))


def report(log: str, most: int = 60) -> list[str]:
    """What to print of a failed step: the names, then the lines that tell, each once."""
    lines = [*(f"failed: {name}" for name in names(log)), *dict.fromkeys(telling(log.splitlines()))]
    left_out = len(lines) - most
    return lines if left_out <= 0 else [*lines[:most], f"and {left_out} lines more"]


if __name__ == "__main__":
    text = Path(sys.argv[-1]).read_text(errors="replace")
    print("\n".join(names(text) if sys.argv[1] == "--names" else report(text)))
