"""Backups that processes share, that move in the background, that are compressed: set by the environment, seen in the
statistics, and measured as the operating system sees them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sire
from measure import MIB
from running import line, running, until

# The ways in which allocations come to Sire have nothing to do with it: one is enough.
pytestmark = pytest.mark.skipif(
    os.environ.get("SIRE_TEST_MODE") in ("preload", "preload-expandable", "driver"),
    reason="tiers do not know how memory was heard of; mode torch shows them",
)

PROGRAM = Path(__file__).resolve().with_name("worker_program.py")
Spec = dict[str, Any]


class Worker:
    """One such process."""

    def __init__(self, regions: list[Spec], settings: dict[str, str]) -> None:
        variables = {"PYTHONPATH": str(Path(sire.__file__).resolve().parents[1])}
        command = [sys.executable, PROGRAM, json.dumps(regions)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.program = running(command, env=os.environ | variables | settings, **pipes)
        self.process = self.program.__enter__()
        self.pid = self.process.pid

    def hear(self) -> Any:
        return json.loads(line(self.process))

    def ask(self, *words: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def tier(self, name: str) -> int:
        found = [tier["used_bytes"] for tier in self.ask("stats")["tiers"] if tier["tier"] == name]
        return int(found[0]) if found else 0

    def anonymous(self) -> int:
        """This process's share of anonymous memory, as the kernel counts it."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss_Anon: +(\d+) kB", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10

    def files(self, kind: Callable[[str], bool]) -> dict[int, int]:
        """Blocks of open files whose target is of this kind, by inode, in bytes."""
        found = {}
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                if kind(os.readlink(entry)):
                    status = entry.stat()
                    found[status.st_ino] = status.st_blocks * 512
            except FileNotFoundError:
                continue
        return found

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(120) == 0


@pytest.fixture
def start() -> Iterator[Callable[..., list[Worker]]]:
    """Starts workers, and waits until all are ready."""
    started: list[Worker] = []

    def begin(count: int, regions: list[Spec], **settings: str) -> list[Worker]:
        new = [Worker(regions, settings) for _ in range(count)]
        started.extend(new)
        assert [worker.hear() for worker in new] == ["ready"] * count
        return new

    try:
        yield begin
    finally:
        for worker in started:
            worker.program.__exit__(None, None, None)


def is_shared(target: str) -> bool:
    return "memfd:sire-shared" in target


def host_bytes(workers: list[Worker]) -> int:
    """Memory of these processes together, each page once: anonymous memory, and the files that they share."""
    shared: dict[int, int] = {}
    for worker in workers:
        shared |= worker.files(is_shared)
    return sum(shared.values()) + sum(worker.anonymous() for worker in workers)


def test_two_processes_of_one_model_keep_one_backup(start: Callable[..., list[Worker]], tmp_path: Path) -> None:
    size = 96 * MIB
    regions: list[Spec] = [
        {"tag": "warm", "backup": "cpu", "immutable": True, "mib": 16, "seed": 4},
        {"tag": "weights", "backup": "cpu", "immutable": True, "mib": 96, "seed": 5},
    ]
    workers = start(2, regions, SIRE_SHARED_BACKUPS="1", SIRE_SHARED_DIR=str(tmp_path))
    for worker in workers:
        # What a process needs for copies as such, whatever it copies.
        worker.ask("pause", "warm")
    before = host_bytes(workers)
    reports = [worker.ask("pause", "weights") for worker in workers]
    grown = host_bytes(workers) - before
    assert abs(grown - size) <= size // 20, f"{grown / size:.3f} copies"
    assert reports[1]["bytes_shared"] == size
    assert all(worker.tier("shared") >= size and worker.tier("host") == 0 for worker in workers)
    first, second = workers
    # Who made the backup may go, also without a farewell.
    first.process.kill()
    first.process.wait()
    second.ask("resume")
    assert second.ask("exact")
    assert second.ask("pause")["bytes_copied"] == 0
    second.ask("resume")
    second.end()


def test_backups_move_and_are_compressed_in_the_background(start: Callable[..., list[Worker]], tmp_path: Path) -> None:
    size = 32 * MIB
    regions: list[Spec] = [{"tag": tag, "backup": "auto", "mib": 32, "seed": i} for i, tag in enumerate("abc")]
    regions.append({"tag": "large", "backup": "auto", "mib": 80, "seed": 8})
    regions.append({"tag": "disk", "backup": "disk", "mib": 32, "seed": 9, "small": True})
    settings = {"SIRE_HOST_LIMIT": "64MiB", "SIRE_DISK_LIMIT": "1GiB", "SIRE_DISK_COMPRESS": "always"}
    [worker] = start(1, regions, SIRE_DISK_DIR=str(tmp_path), **settings)

    def on_disk() -> int:
        return sum(worker.files(lambda target: target.startswith(str(tmp_path))).values())

    tiers = {tier["tier"]: tier for tier in worker.ask("stats")["tiers"]}
    assert (tiers["disk"]["limit_bytes"], tiers["host"]["limit_bytes"]) == (1 << 30, 64 * MIB)
    worker.ask("pause", "a")
    assert (worker.tier("host"), on_disk()) == (size, 0)
    # Host memory is full with the next one: what was used first makes way, though nobody asked.
    worker.ask("pause", "b")
    until("it moves there", lambda: worker.tier("disk") >= size and worker.tier("host") <= size)
    worker.ask("pause", "c")
    until("it moves there", lambda: worker.tier("disk") >= 2 * size and worker.tier("host") <= size)
    assert size * 2 <= on_disk() <= size * 2 * 1.05
    assert list(tmp_path.iterdir()) == [], "files have no name"
    regions_now = {each["tag"]: each for each in worker.ask("stats")["regions"]}
    first, second, third = (regions_now[tag]["stored_bytes"] for tag in "abc")
    # The third found no room if the second had not made any yet, which the machine's pace decides.
    assert first == size
    assert sorted((second, third)) == [0, size]
    # It is brought back before it is needed, where there is room.
    assert worker.ask("promote", "a") == size
    assert worker.ask("promote", "b") == 0
    worker.ask("resume")
    assert worker.ask("exact")
    assert on_disk() == 0
    # What host memory has no room for at all goes to the disk at once.
    worker.ask("pause", "large")
    assert worker.tier("disk") >= 80 * MIB
    worker.ask("resume")
    worker.ask("pause", "disk")
    until("it moves there", lambda: 0 < worker.tier("disk") < 16 * MIB and on_disk() < 16 * MIB)
    worker.ask("resume")
    assert worker.ask("exact")
    worker.end()
