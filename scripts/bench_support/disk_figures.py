"""The disk tier, as a share of what O_DIRECT reaches on the same folder in the same minute, with eight requests in flight. What the disk does best at
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


def raw(shop: Workshop, folder: Path, sizes: Sizes, depths: Iterable[int], fed: bool = False) -> dict[int, Sample]:
    """Seconds that O_DIRECT takes at each depth, all in one file. ``fed``: at DEPTH also with requests whose bytes are copied from or to other memory."""
    words = [f"+{depth}" if fed and depth == DEPTH else str(depth) for depth in depths]
    answers = call(shop, "raw", "disk", str(folder), str(sizes.disk), *words)
    return {int(answer["depth"]): answer for answer in answers}


@cache
def best_depths(shop: Workshop, folder: Path, sizes: Sizes) -> dict[str, int]:
    """The depths at which the disk is fastest, each way; found once per run."""
    tries = [raw(shop, folder, sizes, sizes.depths) for _ in range(2)]
    return {way: min(sizes.depths, key=lambda depth: min(found[depth][way] for found in tries)) for way in ("write", "read")}


def at_best(took: list[float], bests: list[float], depth: int) -> str:
    share = median(best / ours for best, ours in zip(bests, took, strict=True))
    return f"{share:.2f} of what the disk does best, with {depth} in flight"


class Limits:
    """What O_DIRECT takes, in seconds of each way, repetition by repetition."""

    def __init__(self, shop: Workshop, sizes: Sizes, folder: Path) -> None:
        self._measured = (shop, folder, sizes)
        self.depths = best_depths(shop, folder, sizes)
        self.plain: dict[str, list[float]] = {way: [] for way in self.depths}
        self.best: dict[str, list[float]] = {way: [] for way in self.depths}
        self.fed: dict[str, list[float]] = {way: [] for way in self.depths}

    def measure(self) -> None:
        found = raw(*self._measured, sorted({DEPTH, *self.depths.values()}), fed=True)
        for way, depth in self.depths.items():
            self.plain[way].append(found[DEPTH][way])
            self.best[way].append(found[depth][way])
            self.fed[way].append(found[DEPTH][f"fed_{way}"])

    def figures(self, name: str, way: str, took: list[float], amount: int, ours: str) -> list[Figure]:
        """What was reached, of O_DIRECT's rate and of what is left of that where a processor copies what a GPU's engine would."""
        goal = Target("ratio", at_least=0.9)
        whole = Figure(name, "GiB/s", rates(took, amount), rates(self.plain[way], amount), target=goal)
        of_fed = Figure(f"{name}.fed", "GiB/s", rates(took, amount), rates(self.fed[way], amount), target=goal)
        for figure, limits in ((whole, self.plain[way]), (of_fed, self.fed[way])):
            figure.doubt(limits, "the disk", STEADY)
            figure.stay_below("the disk")
        whole.notes.append(f"ceiling: O_DIRECT, {DEPTH} requests of 4 MiB in flight, ours are {ours}; {at_best(took, self.best[way], self.depths[way])}")
        of_fed.notes.append(f"ceiling: the same {DEPTH} requests, each of whose bytes its thread copies {'from' if way == 'write' else 'to'} other memory")
        left = median(plain / fed for plain, fed in zip(self.plain[way], self.fed[way], strict=True))
        if left < 0.9 and whole.met is False:
            whole.notes.append(f"out of reach here: with such copies O_DIRECT itself reaches {left:.2f} of that")
        return [whole, of_fed]


def disk(shop: Workshop, sizes: Sizes, folder: Path) -> list[Figure]:
    """Write and read, paired with raw runs."""
    limits = Limits(shop, sizes, folder)
    setup = Setup(sizes.disk, max(1, sizes.disk // (64 * MIB)), "disk", directory=folder)
    ours: list[Sample] = []

    with cycles(shop, shop.sire, setup) as program:
        program.cycle(False)
        for swapped in ways(sizes.repeats):
            if swapped:
                limits.measure()
            ours.append(program.cycle(False))
            if not swapped:
                limits.measure()
    cached = max(sample["cached"] for sample in ours)
    took = {"write": [sample["pause"] + sample["flush"] for sample in ours], "read": [sample["resume"] for sample in ours]}
    written = limits.figures("disk.write", "write", took["write"], sizes.disk, f"{DEPTH} of 1 MiB")
    written[0].notes.append(f"{phases(ours, 'pause')}; the flush to the disk after the pause: {median([s['flush'] for s in ours]) * 1e3:.0f} ms")
    read = limits.figures("disk.read", "read", took["read"], sizes.disk, f"{DEPTH} of 1 MiB")
    read[0].notes.append(phases(ours, "resume"))
    doubt_cached(read, cached)
    return written + read


def doubt_cached(figures: list[Figure], cached: float) -> None:
    """Reads are not to be judged where some of the file was in the page cache."""
    if cached > CACHED:
        for figure in figures:
            figure.meaningless.append(f"{cached:.0%} of the file stayed in the page cache")


def file(shop: Workshop, sizes: Sizes, folder: Path) -> list[Figure]:
    """A resume whose backup is a file that already holds the bytes, paired with raw reads."""
    if ATTACH.encode() not in shop.sire.library.read_bytes():
        raise Unmeasurable(f"not built in this library: {ATTACH}")
    limits = Limits(shop, sizes, folder)
    setup = Setup(sizes.disk, max(1, sizes.disk // (64 * MIB)))
    ours: list[Sample] = []

    with cycles(shop, shop.sire, setup, "file", str(folder)) as program:
        first = program.cycle(False)
        for swapped in ways(sizes.repeats):
            if swapped:
                limits.measure()
            ours.append(program.cycle(False))
            if not swapped:
                limits.measure()
    figures = limits.figures("file.read", "read", [sample["resume"] for sample in ours], sizes.disk, "4 of 2 MiB")
    figures[0].notes.append(f"the first pause, which proves the file: {first['pause']:.2f} s")
    held = max(sample["host"] for sample in ours)
    figures[0].notes.append(f"{held / MIB:.0f} MiB of backups in host memory")
    if held > 0:
        raise Wrong(f"{held:.0f} bytes of a region in a file are backed up in host memory too")
    doubt_cached(figures, max(sample["cached"] for sample in ours))
    return figures
