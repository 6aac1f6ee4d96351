"""Two trainings that each want most of a GPU, and take turns: sire.time_slice.

    sire run -- python examples/time_slices.py

Starts itself twice. Each trains in its turns, and says what it computed, which is to the bit what it computes alone.
"""

from __future__ import annotations

import subprocess
import sys

import sire
import torch

QUANTUM = 0.2
STEPS = 30
WIDTH = 512


def train(seed: int) -> str:
    """Training as one likes it: the end of each step is a safe point, where the turn may end. What came of it."""
    torch.manual_seed(seed)
    with sire.time_slice(quantum=QUANTUM) as turns:
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        data = torch.randn(64, WIDTH, device="cuda")
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = (model(data) - data).square().mean()
            loss.backward()
            optimizer.step()
        figures = turns.figures
        print(
            f"seed {seed}: {figures['turns']} turns, {figures['resident_seconds']:.1f} s resident, "
            f"{figures['waited_seconds']:.1f} s waited, {figures['switch_seconds']:.3f} s for a change of places",
            file=sys.stderr,
        )
        return f"seed {seed}: loss {loss.item():.6f}"


def main() -> None:
    """Both by turns, each as a program of its own; then one after the other, here."""
    command = [sys.executable, __file__]
    programs = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in (1, 2)]
    by_turns = [program.communicate()[0].strip() for program in programs]
    if any(program.returncode != 0 for program in programs):
        sys.exit("FAILED: a training ended with an error")
    alone = [train(1), train(2)]
    print(*by_turns, sep="\n")
    if by_turns != alone:
        sys.exit(f"FAILED: alone it is {alone}")
    print("ok: by turns each computes what it computes alone")


if len(sys.argv) > 1:
    print(train(int(sys.argv[1])))
else:
    main()
