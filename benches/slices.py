"""Trainings that need 80 % of a device: what scripts/bench_support/slice_figures.py starts, twice.

    slices.py DEVICE_MIB STEPS QUANTUM

Says "ready" and then does what each line of its input says, ``WHAT SEED``: a whole training, from an empty device to an empty device, and answers with JSON:
its losses, how often it made way, how long its last pause and resume took, when it began and ended (seconds of the machine's clock).

``alone``  with the device for itself
``turns``  with time slices of QUANTUM seconds
``crowd``  one step with the device for itself, and keeps its memory until the next line
``rest``   nothing
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import sire
import torch

WIDTH = 512
BATCH = 16
# Parameters, gradients and Adam's two moments.
LAYER_BYTES = 4 * 4 * (WIDTH * WIDTH + WIDTH)


class Training:
    """One model, and what has become of it."""

    def __init__(self, seed: int, layers: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))).cuda()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, foreach=False)
        self.data = torch.randn(BATCH, WIDTH, device="cuda")
        self.losses: list[str] = []

    def run(self, steps: int) -> None:
        """The losses are kept to the bit."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = (self.model(self.data) - self.data).square().mean()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item().hex())


def train(seed: int, layers: int, steps: int) -> list[str]:
    """A whole one; nothing of it stays on the device."""
    training = Training(seed, layers)
    training.run(steps)
    losses = training.losses
    del training
    torch.cuda.empty_cache()
    return losses


def by_turns(seed: int, layers: int, steps: int, quantum: float) -> dict[str, Any]:
    """The same, in time slices."""
    with sire.time_slice(quantum=quantum):
        losses = train(seed, layers, steps)
        figures = sire.stats()["time_slice"]
    return {"losses": losses, "switches": figures["switches"], "switch_seconds": figures["switch_seconds"]}


def main() -> None:
    """One process."""
    mib, steps, quantum = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    layers = int(0.8 * mib * 2**20 / LAYER_BYTES)
    torch.cuda.init()
    print("ready", flush=True)
    staying: Training | None = None
    for line in sys.stdin:
        what, seed = line.split()[0], int(line.split()[1])
        if staying is not None:
            staying = None
            torch.cuda.empty_cache()
        begun = time.perf_counter()
        answer: dict[str, Any] = {}
        try:
            if what == "crowd":
                staying = Training(seed, layers)
                staying.run(1)
            elif what == "turns":
                answer = by_turns(seed, layers, steps, quantum)
            elif what == "alone":
                answer = {"losses": train(seed, layers, steps)}
        except torch.cuda.OutOfMemoryError:
            answer = {"out_of_memory": True}
        # The clock is the machine's: the same for all processes.
        print(json.dumps({**answer, "began": begun, "ended": time.perf_counter()}), flush=True)


if __name__ == "__main__":
    main()
