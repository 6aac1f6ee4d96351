"""The disk tier, as a share of what O_DIRECT reaches on the same folder in the same minute, with as many requests in flight. What the disk does best at
any depth is told beside it: many are faster at one than at eight, or the other way round.

A write counts until the bytes are on the disk (pause and flush), a read starts with none of them in the page cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import median

from .child import Sample, Setup, call, cycles
from .figures import MIB, Figure, Target, Unmeasurable, Wrong, rates, ways
from .pause_figures import phases
from .plan import Sizes
from .workshop import Workshop

# A disk whose raw rates differ by more than this within a run is not steady enough to judge by.
STEADY = 2.0
CACHED = 0.05
ATTACH = "sire_attach_file"
# The ceiling's requests are of 4 MiB. The library has 8 of 1 MiB in flight (RECORD of crates/sire-core/src/settings.rs, DEPTH of tier/disk.rs), and of
# files 4 of 2 MiB (PAGE, tier/file.rs): so many bytes stay in a processor's cache.
DEPTH = 8


def raw(shop: Workshop, folder: Path, sizes: Sizes, depths: Iterable[int]) -> dict[int, Sample]:
    """Seconds that O_DIRECT takes at each depth, all in one file."""
    answers = call(shop, "raw", "disk", str(folder), str(sizes.disk), *map(str, depths))
    return {int(answer["depth"]): answer for answer in answers}


@cache
def best_depths(shop: Workshop, folder: Path, sizes: Sizes) -> dict[str, int]:
    """The depths at which the disk is fastest, each way; found once per run."""
    tries = [raw(shop, folder, sizes, sizes.depths) for _ in range(2)]
    return {way: min(sizes.depths, key=lambda depth: min(found[depth][way] for found in tries)) for way in ("write", "read")}


def at_best(took: list[float], bests: list[float], depth: int) -> str:
    share = median(best / ours for best, ours in zip(bests, took, strict=True))
    return f"{share:.2f} of what the disk does best, with {depth} in flight"


def disk(shop: Workshop, sizes: Sizes, folder: Path) -> list[Figure]:
    """Write and read, paired with raw runs."""
    depths = best_depths(shop, folder, sizes)
    setup = Setup(sizes.disk, max(1, sizes.disk // (64 * MIB)), "disk", directory=folder)
    ours: list[Sample] = []
    limits: dict[str, list[float]] = {"write": [], "read": []}
    bests: dict[str, list[float]] = {"write": [], "read": []}

    def measure_raw() -> None:
        found = raw(shop, folder, sizes, sorted({DEPTH, *depths.values()}))
        for way, depth in depths.items():
            limits[way].append(found[DEPTH][way])
            bests[way].append(found[depth][way])

    with cycles(shop, shop.sire, setup) as program:
        program.cycle(False)
        for swapped in ways(sizes.repeats):
            if swapped:
                measure_raw()
            ours.append(program.cycle(False))
            if not swapped:
                measure_raw()
    cached = max(sample["cached"] for sample in ours)
    took = {"write": [sample["pause"] + sample["flush"] for sample in ours], "read": [sample["resume"] for sample in ours]}
    figures = []
    for way, name in (("write", "pause"), ("read", "resume")):
        target = Target("ratio", at_least=0.9)
        figure = Figure(f"disk.{way}", "GiB/s", rates(took[way], sizes.disk), rates(limits[way], sizes.disk), target=target)
        figure.doubt(limits[way], "the disk", STEADY)
        figure.stay_below("the disk")
        figure.notes.append(f"ceiling: O_DIRECT, {DEPTH} requests of 4 MiB in flight, ours are {DEPTH} of 1 MiB; {phases(ours, name)}")
        figure.notes.append(at_best(took[way], bests[way], depths[way]))
        if way == "write":
            figure.notes.append(f"the flush to the disk after the pause: {median([s['flush'] for s in ours]) * 1e3:.0f} ms")
        elif cached > CACHED:
            figure.meaningless.append(f"{cached:.0%} of the file stayed in the page cache")
        figures.append(figure)
    return figures


def file(shop: Workshop, sizes: Sizes, folder: Path) -> list[Figure]:
    """A resume whose backup is a file that already holds the bytes, paired with raw reads."""
    if ATTACH.encode() not in shop.sire.library.read_bytes():
        raise Unmeasurable(f"not built in this library: {ATTACH}")
    depth = best_depths(shop, folder, sizes)["read"]
    setup = Setup(sizes.disk, max(1, sizes.disk // (64 * MIB)))
    ours: list[Sample] = []
    limits: list[float] = []
    bests: list[float] = []

    def measure_raw() -> None:
        found = raw(shop, folder, sizes, sorted({DEPTH, depth}))
        limits.append(found[DEPTH]["read"])
        bests.append(found[depth]["read"])

    with cycles(shop, shop.sire, setup, "file", str(folder)) as program:
        first = program.cycle(False)
        for swapped in ways(sizes.repeats):
            if swapped:
                measure_raw()
            ours.append(program.cycle(False))
            if not swapped:
                measure_raw()
    took = [sample["resume"] for sample in ours]
    goal = Target("ratio", at_least=0.9)
    figure = Figure("file.read", "GiB/s", rates(took, sizes.disk), rates(limits, sizes.disk), target=goal)
    figure.doubt(limits, "the disk", STEADY)
    figure.stay_below("the disk")
    figure.notes.append(f"ceiling: O_DIRECT, {DEPTH} requests of 4 MiB in flight, ours are 4 of 2 MiB; {at_best(took, bests, depth)}")
    figure.notes.append(f"the first pause, which proves the file: {first['pause']:.2f} s")
    held = max(sample["host"] for sample in ours)
    figure.notes.append(f"{held / MIB:.0f} MiB of backups in host memory")
    if held > 0:
        raise Wrong(f"{held:.0f} bytes of a region in a file are backed up in host memory too")
    cached = max(sample["cached"] for sample in ours)
    if cached > CACHED:
        figure.meaningless.append(f"{cached:.0%} of the file stayed in the page cache")
    return [figure]
