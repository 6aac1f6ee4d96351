"""A process of test_preemption.py: does what it is told line by line (JSON), and passes safe points meanwhile.

It owns memory that may give way, or needs some, or both.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
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
        self.slice = contextlib.ExitStack()
        self.taken: list[torch.Tensor] = []
        self.stays_away = False

    def fill(self, tag: str, mib: int, backup: str | None = "cpu", device: int = 0) -> str:
        content = torch.arange(mib * MIB // 8, dtype=torch.int64).mul_(len(tag))
        # In hook mode torch a region is about the current device.
        with torch.cuda.device(device), sire.region(tag, backup=backup):
            self.tensors[tag] = content.cuda()
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

    def wants(self, mib: int, priority: int = 0, timeout: float = 60.0, device: int = 0) -> str:
        """Waits for memory, and takes it from the driver."""
        try:
            need = sire.wait_for_memory(mib * MIB, device=device, timeout=timeout, priority=priority)
            self.need.enter_context(need)
        except sire.ReservationTimeoutError as error:
            return str(error)
        self.taken.append(torch.full((mib * MIB,), 7, dtype=torch.uint8, device=f"cuda:{device}"))
        return "has" if bool((self.taken[-1].cpu() == 7).all()) else "wrong"

    def number(self) -> int:
        return os.getpid()

    def turns(self, quantum: float) -> str:
        """From now on it takes turns with whoever else does."""
        self.slice.enter_context(sire.time_slice(quantum=quantum))
        return "turn"

    def no_turns(self) -> str:
        self.slice.close()
        return "left"

    def fork(self, closed: str, until: str) -> int:
        """A child that closes its copy of the need, which is none of its business, and ends when there is a file."""
        child = os.fork()
        if child == 0:
            try:
                self.need.close()
                Path(closed).touch()
                end = time.monotonic() + 200
                while not Path(until).exists() and time.monotonic() < end:
                    time.sleep(0.01)
            finally:
                os._exit(0)
        return child

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
    agent = Agent()

    def listen() -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if order.get("at_once"):
                # While the other thread waits for memory, say.
                print(json.dumps(getattr(agent, order["at_once"])(**order["arguments"])), flush=True)
            else:
                orders.put(line)

    threading.Thread(target=listen, daemon=True).start()
    torch.zeros(1, device="cuda")
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
