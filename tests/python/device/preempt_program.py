"""A process of test_preemption.py: does what it is told line by line (JSON), and passes safe points meanwhile.

It owns memory that may give way, or needs some, or both.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
from typing import Any

import sire
import torch

MIB = 1 << 20


class Agent:
    """What it has, by tag."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.marks: dict[str, sire.Reclaimable] = {}
        self.need = contextlib.ExitStack()
        self.taken: list[torch.Tensor] = []
        self.stays_away = False

    def fill(self, tag: str, mib: int, backup: str | None = "cpu") -> str:
        with sire.region(tag, backup=backup):
            self.tensors[tag] = torch.arange(mib * MIB // 8, dtype=torch.int64).mul_(len(tag)).cuda()
        return "filled"

    def mark(self, tag: str, **terms: Any) -> str:
        try:
            self.marks[tag] = sire.reclaimable(tag, **terms)
        except sire.SireError as error:
            return str(error)
        return "marked"

    def unmark(self, tag: str) -> str:
        try:
            self.marks.pop(tag).close()
        except sire.SireError as error:
            return str(error)
        return "unmarked"

    def unmark_in_a_capture(self, tag: str) -> str:
        with sire.cuda_graph(torch.cuda.CUDAGraph(), tag="graph"):
            return self.unmark(tag)

    def used(self, tag: str, ago: float) -> str:
        self.marks[tag].used(ago)
        return "used"

    def figures(self, tag: str) -> dict[str, Any]:
        return self.marks[tag].figures

    def check(self, tag: str) -> bool:
        """Whether it holds what it held at the beginning."""
        found = self.tensors[tag].cpu()
        return bool(torch.equal(found, torch.arange(len(found), dtype=torch.int64).mul_(len(tag))))

    def state(self, tag: str) -> str:
        return next(str(each["state"]) for each in sire.stats()["regions"] if each["tag"] == tag)

    def pause(self, tag: str) -> str:
        sire.pause(tag)
        return "paused"

    def resume(self, tag: str) -> str:
        sire.resume(tag)
        return "resumed"

    def wants(self, mib: int, priority: int = 0, timeout: float = 60.0) -> str:
        """Waits for memory, and takes it from the driver."""
        try:
            self.need.enter_context(sire.wait_for_memory(mib * MIB, timeout=timeout, priority=priority))
        except sire.ReservationTimeoutError as error:
            return str(error)
        self.taken.append(torch.full((mib * MIB,), 7, dtype=torch.uint8, device="cuda"))
        return "has" if bool((self.taken[-1].cpu() == 7).all()) else "wrong"

    def meet(self) -> str:
        """Passes no safe point before it has done what it is told next."""
        self.stays_away = True
        return "here"

    def done(self) -> str:
        """Needs nothing any more."""
        self.taken.clear()
        torch.cuda.empty_cache()
        self.need.close()
        return "done"


def main() -> None:
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [orders.put(line) for line in sys.stdin], daemon=True).start()
    torch.zeros(1, device="cuda")
    agent = Agent()
    print(json.dumps("ready"), flush=True)
    while True:
        if not agent.stays_away:
            sire.safe_point()
        with contextlib.suppress(queue.Empty):
            order = json.loads(orders.get(timeout=0.002))
            agent.stays_away = False
            print(json.dumps(getattr(agent, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
