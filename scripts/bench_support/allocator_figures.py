"""The whole-process allocator against PyTorch's own: the same calls, on the same device, in the same run, in two processes that take turns."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from .child import Ask, answering
from .figures import MIB, Figure, Target, Unmeasurable, Wrong, ways
from .plan import Sizes
from .workshop import ROOT, Workshop

CHILD = Path(__file__).with_name("allocator_child.py")
PAIR_SIZES = (4096, 65536, 1 << 20, 16 << 20)
WORKLOADS = ("training", "checkpointed", "inference", "beams")
THREADS = 8

Answer = dict[str, Any]
# Ours and PyTorch's, by repetition.
Answers = list[tuple[Answer, Answer]]


def native() -> str:
    """The other side, by the version that this interpreter has: the sides run on it, too."""
    try:
        return f"PyTorch {metadata.version('torch')}'s own allocator"
    except metadata.PackageNotFoundError:
        return "PyTorch's own allocator"


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


def in_turns(ours: Ask, theirs: Ask, line: str, repeats: int) -> Answers:
    """Ours and PyTorch's, one right after the other, in turns. Once before, so that first times do not count."""
    ours(line), theirs(line)
    found = []
    for other_first in ways(repeats):
        if other_first:
            right, left = theirs(line), ours(line)
        else:
            left, right = ours(line), theirs(line)
        found.append((left, right))
    return found


def both(shop: Workshop, repeats: int, *lines: str) -> list[Answers]:
    """The answers to each line, of two processes that are started once."""
    with side(shop, "sire") as ours, side(shop, "native") as theirs:
        return [in_turns(ours, theirs, line, repeats) for line in lines]


def calls(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """An allocation of a cached size and its free, by PyTorch's own call and by torch.empty."""
    figures = []
    kinds = (
        ("pairs", "pair", 0.8, "PyTorch's raw allocate and free of a cached size"),
        ("empty", "empty", 1.0, "torch.empty less the same on the meta device"),
    )
    rest = f"{sizes.calls} {' '.join(map(str, PAIR_SIZES))}"
    found = both(shop, sizes.repeats, *(f"{command} {rest}" for command, *_ in kinds))
    for (_, name, limit, note), answers in zip(kinds, found, strict=True):
        for size in map(str, PAIR_SIZES):
            ours, theirs = ([answer[which][size] for answer in answers] for which in (0, 1))
            figure = Figure(f"alloc.{size}.{name}_vs_native", "ns", ours, theirs, target=Target("ratio", at_most=limit))
            figure.notes.append(f"{note}; ceiling: {native()}; less is better")
            figures.append(figure)
    return figures


def threads(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """Several threads that free and allocate at the same time."""
    [answers] = both(shop, sizes.repeats, f"threads {THREADS} {sizes.calls} 4096")
    ours, theirs = ([answer[which]["seconds"] * 1e3 for answer in answers] for which in (0, 1))
    figure = Figure(f"threads{THREADS}.vs_native", "ms", ours, theirs, target=Target("ratio", at_most=1.0))
    figure.notes.append(f"{THREADS} threads of Python, {sizes.calls} pairs each; ceiling: {native()}; less is better")
    return [figure]


def blocks(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """With very many blocks live at once."""
    [answers] = both(shop, sizes.repeats, f"blocks {sizes.allocations}")
    figures = []
    for command, name, note in (("made", "make", "an allocation"), ("churned", "churn", "a free and an allocation, in no order of addresses")):
        ours, theirs = ([answer[which][command] for answer in answers] for which in (0, 1))
        figure = Figure(f"blocks.{name}_vs_native", "ns", ours, theirs)
        figure.notes.append(f"{note}, with {sizes.allocations:,} small blocks live, Python's loop included; ceiling: {native()}; less is better")
        figures.append(figure)
    return figures


def traces(shop: Workshop, sizes: Sizes, folder: Path, names: Sequence[str] = WORKLOADS) -> list[Figure]:
    """The allocations of real workloads, recorded under PyTorch's allocator and replayed on both, sixteen times as large."""
    files = [folder / f"{name}.allocations" for name in names]
    with side(shop, "native") as recorder:
        recorded = [recorder(f"record {name} {file}") for name, file in zip(names, files, strict=True)]
    replayed = both(shop, sizes.repeats, *(f"replay {file}" for file in files))
    return [figure for each in zip(names, recorded, replayed, strict=True) for figure in of_trace(*each)]


def of_trace(name: str, recorded: Answer, answers: Answers) -> list[Figure]:
    """What one workload's replays have shown."""

    def sides(value: Callable[[Answer], float]) -> tuple[list[float], list[float]]:
        return [value(ours) for ours, _ in answers], [value(theirs) for _, theirs in answers]

    used = answers[0][0]["allocated"] / MIB
    reserved = Figure(f"trace.{name}.reserved_vs_native", "MiB", *sides(lambda one: one["reserved"] / MIB), target=Target("ratio", at_most=1.0))
    reserved.notes.append(f"of {recorded['what']}: most memory held at once, for {used:.0f} MiB in use; ceiling: {native()}; less is better")
    kept = Figure(f"trace.{name}.fragmentation", "x", *sides(lambda one: one["reserved"] / one["allocated"]))
    kept.notes.append(f"most memory held, as a multiple of the most in use; ceiling: the same of {native()}; less is better")
    times = Figure(f"trace.{name}.time_vs_native", "ms", *sides(lambda one: one["later"] * 1e3))
    times.notes.append(f"{answers[0][0]['calls']:.0f} calls, Python's loop included; ceiling: {native()}; less is better")
    return [reserved, kept, times]
