"""A training that needs 80 % of a device: what scripts/bench_support/slice_figures.py starts.

    slices.py alone|sliced|crowd SEED DEVICE_MIB STEPS

Says "ready", begins at a line on its input, and prints its losses, how often it changed places, and when it began and ended (seconds), as JSON. ``crowd``
stays until it is killed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import sire
import torch

WIDTH = 512
# Parameters, gradients and Adam's two moments.
LAYER_BYTES = 4 * 4 * (WIDTH * WIDTH + WIDTH)


def train(seed: int, layers: int, steps: int) -> list[str]:
    """The losses, to the bit."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False)
    data = torch.randn(64, WIDTH, device="cuda")
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(data) - data).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return losses


def main() -> None:
    """One process."""
    what, seed, mib, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    layers = int(0.8 * mib * 2**20 / LAYER_BYTES)
    torch.cuda.init()
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    turns: contextlib.AbstractContextManager[Any] = sire.time_slice(quantum=0.5) if what == "sliced" else contextlib.nullcontext()
    switches = 0
    with turns:
        losses = train(seed, layers, steps)
        if what == "sliced":
            switches = sire.stats()["time_slice"]["switches"]
    # The clock is the machine's: the same for all processes.
    print(json.dumps({"losses": losses, "switches": switches, "began": begun, "ended": time.perf_counter()}), flush=True)
    if what == "crowd":
        sys.stdin.readline()


if __name__ == "__main__":
    main()
