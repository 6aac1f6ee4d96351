"""Pauses that have nothing to copy: of content that was saved before and has not changed, and of content that another process has saved."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from .child import call, failed
from .figures import GIB, MIB, Figure, Target, Unmeasurable
from .plan import Sizes
from .workshop import Workshop

# What a clean pause may cost beyond one that throws everything away: the larger of the two.
SHARE, MICROSECONDS = 0.1, 200.0
PROCESSES = 4
# In two parts: an older library does not have the variable, and its documentation does not name it.
SHARED = "SIRE_" + "SHARED_BACKUPS"
DEVICE = "sire-sim"
# Shared backups are files in memory that nobody maps; a process has them open under this name.
STORE = "/memfd:sire-shared"


def run(shop: Workshop, sizes: Sizes, kind: str) -> dict[str, Any]:
    """One process that pauses a clean region and a thrown-away one in turns."""
    pieces = max(2, sizes.clean // (32 * MIB))
    arguments = (str(sizes.clean), str(pieces), str(max(sizes.repeats, 2)), kind)
    answer: dict[str, Any] = call(shop, "clean", *arguments, saver=shop.sire, memory=3 * sizes.clean)[0]
    return answer


def microseconds(seconds: list[float]) -> list[float]:
    return [each * 1e6 for each in seconds]


def clean(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """Pauses of what was declared not to change, beside discarding ones of the same size."""
    declared = run(shop, sizes, "declared")
    copied = Figure("pause.clean.bytes_copied", "B", declared["copied"], target=Target("max", at_most=0))
    copied.notes.append(f"declared not to change; a changed piece was copied again: {declared['again'] / MIB:.0f} MiB")
    with_clean, without = microseconds(declared["clean"]), microseconds(declared["discard"])
    cost = beyond("pause.clean.extra_us", with_clean, without, [0.0] * len(without))
    cost.notes.append(
        f"clean {median(with_clean):.0f} us, discard {median(without):.0f} us, {sizes.clean / GIB:.3g} GiB; "
        "ceiling: the larger of 10 % of the discard and 200 us; less is better"
    )
    cost.doubt(without, "the discarding pause", 3.0)
    return [copied, cost]


def verified(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """The hash pass on top. On the software device a thread of the host computes it; a GPU reads its memory some 100 times faster."""
    found = run(shop, sizes, "verified")
    with_clean, without, looks = (microseconds(found[name]) for name in ("clean", "discard", "looks"))
    copied = Figure("pause.verified.bytes_copied", "B", found["copied"], target=Target("max", at_most=0))
    cost = beyond("pause.verified.extra_us", with_clean, without, looks)
    rate = sizes.clean / GIB / (median(looks) / 1e6)
    cost.notes.append(
        f"looking at {sizes.clean / GIB:.3g} GiB by itself (sire_pre_copy, nothing changed): {median(looks):.0f} us, {rate:.1f} GiB/s; "
        "ceiling: that, and what a clean pause may cost beyond the discarding one; less is better"
    )
    cost.doubt(looks, "looking at the pages", 3.0)
    # Nearly all of it is the pass, and of two passes in a row either may be the longer one.
    cost.tell_tie()
    return [copied, cost]


def beyond(name: str, clean: list[float], discard: list[float], looks: list[float]) -> Figure:
    """What pauses cost beyond discarding ones, of what they may: looking, and the usual allowance. All in microseconds."""
    extra = [a - b for a, b in zip(clean, discard, strict=True)]
    allowed = [look + max(SHARE * base, MICROSECONDS) for look, base in zip(looks, discard, strict=True)]
    ratios = [cost / limit for cost, limit in zip(extra, allowed, strict=True)]
    return Figure(name, "us", extra, allowed, ratios, Target("ratio", at_most=1.0))


class Sharer:
    """One process that holds the model."""

    def __init__(self, shop: Workshop, amount: int, folder: Path) -> None:
        environment = shop.environment(shop.sire, amount, timing=False) | {SHARED: "1", "TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder)}
        command, pipe = [str(shop.programs["share"]), str(amount)], subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def done(self, step: str) -> None:
        """Waits for the end of a step."""
        assert self.process.stdout and self.process.stderr
        line = self.process.stdout.readline()
        if not line or json.loads(line)["done"] != step:
            message = self.process.stderr.read()
            raise failed("share", self.process.wait(), message)

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def held(self) -> int:
        """Its proportional share of memory in bytes, without the software device's."""
        total, counted = 0, True
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                counted = DEVICE not in line
            elif words[0] == "Pss:" and counted:
                total += int(words[1]) * 1024
        return total

    def files(self) -> dict[int, int]:
        """The shared files in memory that it has open: bytes by inode."""
        found = {}
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            if str(entry.readlink()).startswith(STORE):
                status = entry.stat()
                found[status.st_ino] = status.st_blocks * 512
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                stream.close()


def held(sharers: list[Sharer]) -> int:
    """Host memory of all of them in bytes: what they map by proportional share, and each shared file once."""
    files: dict[int, int] = {}
    for sharer in sharers:
        files |= sharer.files()
    return sum(sharer.held() for sharer in sharers) + sum(files.values())


def shared(shop: Workshop, sizes: Sizes, folder: Path) -> list[Figure]:
    """Host bytes of several processes that pause the same model, in copies of it."""
    if SHARED.encode() not in shop.sire.library.read_bytes():
        raise Unmeasurable(f"not built in this library: {SHARED}")
    rounds = [copies_held(shop, sizes, folder) for _ in range(sizes.repeats)]
    last = [copies[-1] for copies in rounds]
    figure = Figure("shared_backup.share", "copies", last, [1.0] * len(last), target=Target("value", at_most=1.05))
    grown = ", ".join(f"{each:.2f}" for each in rounds[-1])
    who = f"{PROCESSES} processes of one model of {sizes.shared / MIB:.0f} MiB, one after the other"
    figure.notes.append(f"{who}: {grown}; proportional memory (PSS), and files in memory once each")
    return [figure]


def copies_held(shop: Workshop, sizes: Sizes, folder: Path) -> list[float]:
    """What all of them hold after each one's pause, in copies of the model."""
    sharers: list[Sharer] = []
    try:
        for _ in range(PROCESSES):
            sharers.append(Sharer(shop, sizes.shared, folder))
            sharers[-1].done("filled")
        before = held(sharers)
        shares = []
        for sharer in sharers:
            sharer.go_on()
            sharer.done("paused")
            shares.append((held(sharers) - before) / sizes.shared)
        for sharer in sharers:
            sharer.go_on()
            sharer.done("compared")
    finally:
        for sharer in sharers:
            sharer.end()
    return shares
