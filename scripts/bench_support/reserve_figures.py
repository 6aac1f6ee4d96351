"""Reservations between processes: eight race on two devices while they are killed and stopped (crates/sire-ledger/tests/race.rs)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from .figures import Figure, Target, Unmeasurable, Wrong
from .plan import Sizes
from .workshop import ROOT

UNITS = {
    "reserve.overcommits": "",
    "reserve.lost": "",
    "reserve.wait_p50_ms": "ms",
    "reserve.wait_p99_ms": "ms",
    "ledger.update_ns": "ns",
}
NONE = Target("max", at_most=0)
TESTS = ("what_is_granted_is_there_whoever_is_killed_or_stopped", "saying_what_is_owned_is_one_small_write")


def reserve(sizes: Sizes) -> list[Figure]:
    """Each figure, once per repetition."""
    if not shutil.which("cargo"):
        raise Unmeasurable("the race is a test, and there is no cargo to build it")
    found: dict[str, list[float]] = {name: [] for name in UNITS}
    for _ in range(sizes.repeats):
        for name, value in race(sizes.rounds):
            found[name].append(value)
    figures = [Figure(name, unit, found[name], target=None if unit else NONE) for name, unit in UNITS.items()]
    for figure in figures:
        figure.notes.append(f"8 processes, 2 devices, {sizes.rounds} rounds each" if figure.name.startswith("reserve") else "one change of a record")
    return figures


COMMAND = ["cargo", "test", "-q", "--release", "--locked", "-p", "sire-ledger", "--test", "race"]


def build() -> None:
    """The test, so that its time is no part of a figure's. What fails here fails again, and is told, where it is run."""
    if shutil.which("cargo"):
        subprocess.run([*COMMAND, "--no-run"], cwd=ROOT, capture_output=True)


def race(rounds: int) -> list[tuple[str, float]]:
    """The figures that one run prints."""
    command = [*COMMAND, "--", "--exact", "--nocapture", "--test-threads=1", *TESTS]
    environment = {**os.environ, "SIRE_TEST_LEDGER_ROUNDS": str(rounds)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise Wrong(f"a reservation did not hold:\n{(done.stdout + done.stderr)[-2000:]}")
    return [(name, float(value)) for name, value in re.findall(r"^figure: (\S+) (\S+)$", done.stdout, re.MULTILINE)]
