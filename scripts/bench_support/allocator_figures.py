"""The whole-process allocator against PyTorch's own: the same calls, on the same device, in the same run, in two processes that take turns."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .child import Ask, answering
from .figures import MIB, Figure, Target, Unmeasurable, Wrong, ways
from .plan import Sizes
from .workshop import ROOT, Workshop

CHILD = Path(__file__).with_name("allocator_child.py")
PAIR_SIZES = (4096, 65536, 1 << 20, 16 << 20)
WORKLOADS = ("training", "checkpointed", "inference", "beams")
THREADS = 8

Answer = dict[str, float]


@contextmanager
def side(shop: Workshop, name: str) -> Iterator[Ask]:
    """A process of one side."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SIRE_", "TMS_", "LD_PRELOAD"))}
    kept |= {"SIRE_LIBRARY": str(shop.sire.library), "PYTHONPATH": str(ROOT / "python-shim" / "src"), "OMP_NUM_THREADS": "1"}
    kept |= {"SIRE_SIM_MEMORY": str(3072 * MIB), "SIRE_SIM_POISON": "off", "SIRE_LOG": "error"}
    try:
        with answering([sys.executable, str(CHILD), name], kept, f"{CHILD.name} {name}") as ask:
            yield ask
    except Wrong as error:
        last = str(error).splitlines()[-1]
        if "No module named 'torch'" in last or "CUDA" in last:
            raise Unmeasurable(f"needs PyTorch on a device (scripts/test --only env makes one): {last}") from None
        raise


def both(shop: Workshop, repeats: int, *arguments: str) -> list[tuple[Answer, Answer]]:
    """Ours and PyTorch's, one right after the other, in turns. Once before, so that first times do not count."""
    found, line = [], " ".join(arguments)
    with side(shop, "sire") as ours, side(shop, "native") as theirs:
        ours(line), theirs(line)
        for other_first in ways(repeats):
            if other_first:
                right, left = theirs(line), ours(line)
            else:
                left, right = ours(line), theirs(line)
            found.append((left, right))
    return found


def calls(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """An allocation of a cached size and its free, by PyTorch's own call and by torch.empty."""
    figures = []
    for command, name, limit, note in (
        ("pairs", "pair", 0.8, "PyTorch's raw allocate and free of a cached size"),
        ("empty", "empty", 1.0, "torch.empty less the same on the meta device"),
    ):
        answers = both(shop, sizes.repeats, command, str(sizes.calls), *map(str, PAIR_SIZES))
        for size in map(str, PAIR_SIZES):
            ours, theirs = ([answer[which][size] for answer in answers] for which in (0, 1))
            figure = Figure(f"alloc.{size}.{name}_vs_native", "ns", ours, theirs, target=Target("ratio", at_most=limit))
            figure.notes.append(f"{note}; ceiling: PyTorch's own allocator; less is better")
            figures.append(figure)
    return figures


def threads(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """Several threads that free and allocate at the same time."""
    answers = both(shop, sizes.repeats, "threads", str(THREADS), str(sizes.calls), "4096")
    ours, theirs = ([answer[which]["seconds"] * 1e3 for answer in answers] for which in (0, 1))
    figure = Figure(f"threads{THREADS}.vs_native", "ms", ours, theirs, target=Target("ratio", at_most=1.0))
    figure.notes.append(f"{THREADS} threads of Python, {sizes.calls} pairs each; ceiling: PyTorch's own allocator; less is better")
    return [figure]


def blocks(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """With very many blocks live at once."""
    answers = both(shop, sizes.repeats, "blocks", str(sizes.allocations))
    figures = []
    for command, name, note in (("made", "make", "an allocation"), ("churned", "churn", "a free and an allocation, in no order of addresses")):
        ours, theirs = ([answer[which][command] for answer in answers] for which in (0, 1))
        figure = Figure(f"blocks.{name}_vs_native", "ns", ours, theirs)
        figure.notes.append(f"{note}, with {sizes.allocations:,} small blocks live, Python's loop included; ceiling: PyTorch's own allocator; less is better")
        figures.append(figure)
    return figures


def traces(shop: Workshop, sizes: Sizes, folder: Path) -> list[Figure]:
    """The allocations of real workloads, recorded under PyTorch's allocator and replayed on both, sixteen times as large."""
    figures = []
    for name in WORKLOADS:
        file = folder / f"{name}.allocations"
        with side(shop, "native") as recorder:
            recorder(f"record {name} {file}")
        answers = both(shop, sizes.repeats, "replay", str(file))
        ours, theirs = ([answer[which]["reserved"] / MIB for answer in answers] for which in (0, 1))
        reserved = Figure(f"trace.{name}.reserved_vs_native", "MiB", ours, theirs, target=Target("ratio", at_most=1.0))
        used = answers[0][0]["allocated"] / MIB
        reserved.notes.append(f"most memory held at once, for {used:.0f} MiB in use; ceiling: PyTorch's own allocator; less is better")
        ours, theirs = ([answer[which]["later"] * 1e3 for answer in answers] for which in (0, 1))
        times = Figure(f"trace.{name}.time_vs_native", "ms", ours, theirs)
        times.notes.append(f"{answers[0][0]['calls']:.0f} calls, Python's loop included; ceiling: PyTorch's own allocator; less is better")
        figures += [reserved, times]
    return figures
