"""The oldest glibc on which a program or library loads, read from its version table.

``python glibc_floor.py FILE ... [--at-most 2.28]`` prints each file's floor and fails if it is above the limit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

Version = tuple[int, int]


def parse(text: str) -> Version:
    """``"2.28"`` as numbers."""
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a glibc version such as 2.28")
    return int(match[1]), int(match[2])


def needed(path: Path) -> dict[Version, list[str]]:
    """The GLIBC versions that ``path`` needs, each with its symbols (from ``readelf``)."""
    listing = subprocess.run(
        ["readelf", "--wide", "--dyn-syms", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[Version, list[str]] = {}
    for symbol, major, minor in re.findall(r"\bUND\s+(\S+)@GLIBC_(\d+)\.(\d+)", listing):
        found.setdefault((int(major), int(minor)), []).append(symbol)
    if not found:
        raise RuntimeError(f"{path} names no glibc symbol at all; is it a dynamic Linux program?")
    return found


def require(path: Path, limit: Version) -> None:
    """Raises if ``path`` does not load on a glibc as old as ``limit``."""
    above = {version: symbols for version, symbols in needed(path).items() if version > limit}
    if above:
        listed = "; ".join(
            f"{_text(version)}: {', '.join(sorted(symbols))}" for version, symbols in sorted(above.items())
        )
        raise RuntimeError(f"{path} needs a newer glibc than {_text(limit)}: {listed}")


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="The oldest glibc on which each FILE loads.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--at-most", type=parse, default=None, metavar="X.Y")
    arguments = parser.parse_args()
    for path in arguments.files:
        print(f"{path}: GLIBC_{_text(max(needed(path)))}")
        if arguments.at_most is not None:
            try:
                require(path, arguments.at_most)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
