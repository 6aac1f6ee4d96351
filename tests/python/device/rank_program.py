"""One rank of a job: pauses and resumes with the others, and prints what it saw as JSON.

``rank_program.py RANK SIZE STORE CASE...``; the cases are functions here, `test_distributed.py` says what must come of
them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import sire
import torch
import torch.distributed as dist
from sire.distributed._ballot import Ballot, Failure

MIB = 1 << 20
LAST = 3


def attempt(call: Any) -> dict[str, Any]:
    start = time.monotonic()
    try:
        report = call()
    except sire.RankError as error:
        said = {"error": type(error).__name__, "rank": error.rank, "reason": error.reason, "status": error.status}
        return said | {"message": str(error), "seconds": time.monotonic() - start}
    return {"changed": report.regions_changed, "moved": report.bytes_moved, "seconds": time.monotonic() - start}


class Rank:
    """Weights with a backup, a cache without one."""

    def __init__(self, rank: int, cases: list[str]) -> None:
        self.rank = rank
        with sire.region("model/weights", backup="cpu"):
            self.weights = torch.full((4 * MIB,), rank, dtype=torch.uint8, device="cuda")
        with sire.region("model/cache"):
            self.cache = torch.full((4 * MIB,), 100 + rank, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self.seen: dict[str, Any] = {}
        for case in cases:
            self.seen[case] = getattr(self, case)() | self.state()

    def state(self) -> dict[str, Any]:
        # In hook mode "allocator" there is a region "default" besides.
        states = {each["tag"]: each["state"] for each in sire.stats()["regions"] if each["tag"].startswith("model/")}
        seen: dict[str, Any] = {"states": states}
        if states["model/weights"] == "resident":
            seen["weights"] = bool((self.weights == self.rank).all())
        if states["model/cache"] == "resident":
            seen["cache"] = bool((self.cache == 100 + self.rank).all())
        return seen

    def round_trip(self) -> dict[str, Any]:
        paused = attempt(lambda: sire.distributed.pause("model", timeout=60))
        free = torch.cuda.mem_get_info()[0]
        again = attempt(lambda: sire.distributed.pause("model", timeout=60))
        resumed = attempt(lambda: sire.distributed.resume("model", timeout=60))
        given = free - torch.cuda.mem_get_info()[0]
        self.cache.fill_(100 + self.rank)
        return {"paused": paused, "again": again, "resumed": resumed, "given": given}

    def fault_at_prepare(self) -> dict[str, Any]:
        """The last rank has a thread inside the region, so that it cannot pause."""
        if self.rank == LAST:
            with sire.region("model/weights", backup="cpu"):
                return attempt(lambda: sire.distributed.pause("model", timeout=60))
        return attempt(lambda: sire.distributed.pause("model", timeout=60))

    def fault_at_resume(self) -> dict[str, Any]:
        """The last rank finds no memory."""
        sire.distributed.pause("model/weights", timeout=60)
        if self.rank == LAST:
            sire.set_margin("100GiB")
        failed = attempt(lambda: sire.distributed.resume("model/weights", timeout=60))
        sire.set_margin(0)
        state = self.state()["states"]
        resumed = attempt(lambda: sire.distributed.resume("model/weights", timeout=60))
        return failed | {"while": state, "resumed": resumed}

    def another_call(self) -> dict[str, Any]:
        """The last rank calls something else."""
        call = sire.distributed.resume if self.rank == LAST else sire.distributed.pause
        return attempt(lambda: call("model", timeout=60))

    def a_group(self) -> dict[str, Any]:
        """Two ranks of four, while the others do nothing."""
        group = dist.new_group([1, 2])
        if self.rank not in (1, 2):
            try:
                sire.distributed.pause("model", group=group)
            except (sire.SireError, ValueError) as error:
                return {"error": type(error).__name__}
        paused = attempt(lambda: sire.distributed.pause("model/weights", group=group, timeout=60))
        return {"paused": paused, "resumed": attempt(lambda: sire.distributed.resume("model/weights", group=group))}

    def partly_paused(self) -> dict[str, Any]:
        """What was paused before the call stays paused when it is undone."""
        sire.pause("model/weights")
        seen = self.fault_at_cache() | {"between": self.state()["states"]}
        sire.resume("model/weights")
        return seen

    def fault_at_cache(self) -> dict[str, Any]:
        if self.rank == 0:
            with sire.region("model/cache"):
                return attempt(lambda: sire.distributed.pause("model", timeout=60))
        return attempt(lambda: sire.distributed.pause("model", timeout=60))

    def killed(self) -> dict[str, Any]:
        """The last rank dies before it votes."""
        if self.rank == LAST:
            sire.before_pause(lambda _tag: os.kill(os.getpid(), signal.SIGKILL))
        return attempt(lambda: sire.distributed.pause("model", timeout=6))

    def killed_after_its_vote(self) -> dict[str, Any]:
        """In a job of two, rank 1 dies when it has voted that it is prepared: rank 0 commits, and hears no more of it.

        Until then both are waited for as long as a busy machine may take.
        """
        seen: dict[str, Any] = {}
        propose, whole_round = Ballot._propose, Ballot.round

        def die(ballot: Ballot, name: str, proposal: Failure | None) -> Failure | None:
            if name == "prepared":
                os.kill(os.getpid(), signal.SIGKILL)
            return propose(ballot, name, proposal)

        def look(ballot: Ballot, name: str, word: str, failure: Failure | None) -> Failure | None:
            if name == "committed":
                seen.update(committed=self.state()["states"], free=torch.cuda.mem_get_info()[0])
                ballot._timeout = 1.0
            return whole_round(ballot, name, word, failure)

        if self.rank == 1:
            Ballot._propose = die  # type: ignore[method-assign]
        Ballot.round = look  # type: ignore[method-assign]
        free = torch.cuda.mem_get_info()[0]
        seen |= attempt(lambda: sire.distributed.pause("model", timeout=120))
        seen["given"] = seen.pop("free") - free
        Ballot.round = whole_round  # type: ignore[method-assign]
        with sire.paused("model"):
            seen["alone"] = self.state()["states"]
        return seen


def main() -> None:
    rank, size, folder, *cases = sys.argv[1:]
    store = dist.FileStore(str(Path(folder) / "store"), int(size))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(size))
    seen = Rank(int(rank), cases).seen
    print(json.dumps(seen), flush=True)
    # The others may still look into what a process group would close; after a death there is nobody to say good-bye to.
    os._exit(0)


main()
