"""A training that needs 80 % of a device of 32 MiB, and prints each loss to the bit; test_time_slices.py starts it.

    slice_program.py WHAT SEED [STEPS [ENOUGH]]

``alone``: STEPS steps in a process that Sire is no part of, and that keeps its memory until a line comes. The others
begin at a line on their input, and take turns: ``sliced``: STEPS steps, or fewer when it has changed places ENOUGH
times. ``gated``: the same, but passes no safe point in its first turn until another line comes. ``stays``: waits for a
line at its end, and keeps its memory until then. ``holds``: twice takes a turn, until a line comes, and begins the
second one at a line, too. ``patient``: waits at safe points to be interrupted, and says what it has then. ``stranger``:
knows nothing of turns, has SEED MiB, and says at each line how much of the device is free.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import torch

# Who is alone knows nothing of Sire.
ALONE = sys.argv[1:2] == ["alone"]
if not ALONE:
    import sire

QUANTUM = 0.05
WIDTH = 512
LAYERS = 6


def say(*words: object) -> None:
    """One line, at once."""
    print(*words, flush=True)


def losses(seed: int, steps: int) -> Iterator[float]:
    """A training with all that one has: parameters, gradients, moments, random numbers, memory that no policy keeps."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Dropout(0.1))]
    model = torch.nn.Sequential(*layers).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False)
    with contextlib.nullcontext() if ALONE else sire.region("noise"):
        noise = torch.randn(16, WIDTH, device="cuda")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(noise) - noise).square().mean()
        loss.backward()
        optimizer.step()
        yield loss.item()


def switches() -> int:
    """How often this process has made way."""
    turns = sire.stats()["time_slice"]
    return int(turns["switches"]) if turns else 0


def train(seed: int, steps: int, enough: int) -> None:
    """Prints what it does; ends early when it has changed places often enough."""
    for loss in losses(seed, steps):
        say("step", loss.hex(), switches())
        if switches() >= enough:
            break


def alone(seed: int, steps: int) -> None:
    """Trains as if nobody else were there."""
    for loss in losses(seed, steps):
        say("step", loss.hex(), 0)
    with open("/proc/self/maps") as maps:
        say("done", "sire" in sys.modules or "libsire_alloc" in maps.read())
    sys.stdin.readline()


def main() -> None:
    """What the arguments say."""
    what, seed, steps, enough = sys.argv[1], *(int(each) for each in (*sys.argv[2:], "400", "1000000")[:3])
    if ALONE:
        alone(seed, steps)
        return
    if os.environ.get("SIRE_TEST_MODE") in ("torch", "allocator"):
        sire.use_allocator()
    if what == "stranger":
        kept = torch.ones(seed << 20, dtype=torch.uint8, device="cuda")
        while sys.stdin.readline():
            say("free", torch.cuda.mem_get_info()[0], kept[0].item())
        return
    torch.cuda.init()
    say("ready")
    sys.stdin.readline()
    turns = sire.time_slice(quantum=QUANTUM)
    with turns:
        say("turn")
        if what in ("gated", "holds"):
            sys.stdin.readline()
        if what == "patient":
            patient(seed)
        elif what != "holds":
            train(seed, steps, enough)
        if what == "stays":
            say("done")
            sys.stdin.readline()
    if what == "holds":
        sys.stdin.readline()
        with turns:
            say("turn")
            sys.stdin.readline()


def patient(seed: int) -> None:
    """Each time that it is interrupted: what it computes then from what it has."""
    training = losses(seed, 400)
    for loss in training:
        say("has", loss.hex())
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                sire.safe_point()
                time.sleep(0.002)


if __name__ == "__main__":
    main()
