"""Processes with one number: containers that share a private directory each count their own from 1, and nobody takes one for another."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, clean_environment
from containers import container
from running import line, running
from watching import Dashboard

PROGRAM = """
import os
import sys
import time
import sire
from sire import _library

with sire.region(sys.argv[1], backup="cpu"):
    memory = _library.load().allocate(4 << 20, 0)
print(os.getpid(), flush=True)
while True:
    sire.safe_point()
    time.sleep(0.002)
"""
# More than any process has.
NOBODYS = 2**22 + 1


class Street:
    """A private directory, and programs that can be asked through it."""

    def __init__(self, command: Path, library: Path, stand_in: Path, root: Path, stack: contextlib.ExitStack) -> None:
        self.command, self.root, self._stack = command, root, stack
        self.environment = clean_environment(XDG_RUNTIME_DIR=root)
        own: dict[str, str | Path | None] = {
            "PYTHONPATH": ROOT / "python-shim" / "src",
            "SIRE_LIBRARY": library,
            "SIRE_LIBCUDA": stand_in,
            "SIRE_CONTROL": "1",
            "SIRE_SIM_MEMORY": "64MiB",
        }
        self._programs = clean_environment(XDG_RUNTIME_DIR=root, **own)

    def start(self, tag: str, within: list[str] | None = None) -> int:
        """One with a region of this tag; its number as it counts."""
        command = [*(within or []), sys.executable, "-c", PROGRAM, tag]
        process = self._stack.enter_context(running(command, env=self._programs, stdout=subprocess.PIPE))
        return int(line(process))

    def call(self, socket: int | str, name: str) -> None:
        """A faked identity: the socket of that process has another name from now on."""
        (self.root / "sire" / f"{socket}.sock").rename(self.root / "sire" / f"{name}.sock")

    def run(self, *arguments: object, within: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [*(within or []), str(self.command), *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)

    def states(self, within: list[str] | None = None) -> dict[str, dict[str, str]]:
        """Of all, by name: the state of each tag."""
        found: list[dict[str, Any]] = json.loads(self.run("ps", "--json", within=within).stdout)["processes"]
        silent = [each["silence"] for each in found if "silence" in each]
        assert not silent
        return {each["name"]: {region["tag"]: region["state"] for region in each["stats"]["regions"]} for each in found}


@pytest.fixture
def street(command: Path, library: Path, stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    root = tmp_path_factory.mktemp("run")
    root.chmod(0o700)
    with contextlib.ExitStack() as stack:
        yield Street(command, library, stand_in, root, stack)


def test_containers_that_share_a_directory_are_told_apart(street: Street) -> None:
    within = container()
    if within is None:
        pytest.skip("this machine lets nobody have a PID namespace, or has no unshare (util-linux)")
    assert [street.start(tag, within) for tag in ("one", "other")] == [1, 1]
    # For a third container neither has a number.
    for place in (None, within):
        assert street.states(place) == {"1": {"one": "resident"}, "1-1": {"other": "resident"}}
        refused = street.run("pause", 1, within=place)
        assert refused.returncode == 3
        assert "several processes have the number 1: 1-0, 1-1" in refused.stderr
        assert street.run("pause", "1-1", within=place).returncode == 0
        assert street.states(place) == {"1": {"one": "resident"}, "1-1": {"other": "paused"}}
        assert street.run("resume", "1-1", within=place).stdout.startswith("1-1 resumed")
        assert street.run("pause", "1-0", within=place).stdout.startswith("1 paused")
        assert street.states(place) == {"1": {"one": "paused"}, "1-1": {"other": "resident"}}
        assert street.run("resume", "1-0", within=place).returncode == 0
    with Dashboard(street.command, street.environment) as dashboard:
        order = {"pid": "1-1", "verb": "pause"}
        assert dashboard.ask("api/order", order, token=dashboard.token)[0] == 200
        assert dashboard.ask("api/order", {**order, "pid": 1}, token=dashboard.token)[0] == 400
    assert street.states() == {"1": {"one": "resident"}, "1-1": {"other": "paused"}}
    shown = street.run("ps").stdout
    assert "      1  running" in shown
    assert "    1-1  paused" in shown


def test_of_several_the_one_with_that_number_here_is_meant(street: Street) -> None:
    here, elsewhere = street.start("here"), street.start("elsewhere")
    street.call(elsewhere, f"{here}-1")
    assert street.run("pause", here).returncode == 0
    assert street.states() == {str(here): {"here": "paused"}, f"{here}-1": {"elsewhere": "resident"}}
    assert street.run("resume", here).returncode == 0
    # Neither has it here.
    street.call(here, str(NOBODYS))
    street.call(f"{here}-1", f"{NOBODYS}-7")
    refused = street.run("pause", NOBODYS)
    assert (refused.returncode, "several processes have the number" in refused.stderr) == (3, True)
    assert street.run("pause", f"{NOBODYS}-7").returncode == 0
    assert street.states() == {str(NOBODYS): {"here": "resident"}, f"{NOBODYS}-7": {"elsewhere": "paused"}}
    # The first one ends: then there is but one to mean.
    (street.root / "sire" / f"{NOBODYS}.sock").unlink()
    assert street.run("resume", NOBODYS).returncode == 0


@pytest.mark.parametrize("name", ["", "x", "1-", "1-x", "-1x", "1-2-3"])
def test_what_is_no_process_is_wrong_use(street: Street, name: str) -> None:
    refused = street.run("pause", "--", name)
    assert refused.returncode == 2
    assert "is no process" in refused.stderr
