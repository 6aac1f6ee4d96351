"""Two models that do not fit together: how long it takes to put one down and pick the other up. And what a pause costs work that runs beside it.

Three ways: `serial`, a pause and then a resume; `switch`, both in one call; `ahead`, a pause and then a resume in the background, of which
`first` is when the first allocation can be used. One more cycle of each draws its timeline: what the device has free, and what of the
second model can be used, in MiB by milliseconds.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

from .cuda import GIB, MIB, Cuda
from .interference import occupy
from .kit import Kit, plain_rates, seconds
from .sire_c import Coming

CYCLES = 3
PIECES = 16


class Timeline:
    """While it is open, a thread asks the device what is free, and the resume what can be used, about every millisecond."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._stop = cuda, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.coming: Coming | None = None
        self.points: list[tuple[float, int, int]] = []

    def __enter__(self) -> Timeline:
        self._start = time.perf_counter()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        if self.coming is not None:
            self.coming.close()

    def _watch(self) -> None:
        if self._cuda.context is not None:
            self._cuda.need("cuCtxSetCurrent", self._cuda.context)
        while not self._stop.wait(0.001):
            self._look()

    def _look(self) -> None:
        ready = self.coming.ready() if self.coming is not None else 0
        self.points.append(((time.perf_counter() - self._start) * 1e3, self._cuda.free_memory() >> 20, ready >> 20))

    def thinned(self, most: int = 200) -> list[list[float]]:
        """At most so many points and the last."""
        step = max(1, -(-len(self.points) // most))
        chosen = [*self.points[:-1:step], *self.points[-1:]]
        return [[round(at, 2), free, ready] for at, free, ready in chosen]


# Puts one tag away and brings another back: their names, the first allocation that comes, and who draws.
Way = Callable[[str, str, int, Timeline | None], None]


class Pair:
    """Two models of `size` bytes; the second is resident, and there is room for one and a little."""

    def __init__(self, kit: Kit, size: int, clean: int) -> None:
        self.kit, self.cuda, self.sire, self.each = kit, kit.cuda(), kit.sire(), size // PIECES
        self.content = kit.content(self.cuda)
        self.tags = [f"switch{clean}/{name}" for name in ("a", "b")]
        self.addresses: list[list[int]] = []
        for tag in self.tags:
            self.addresses.append(self.sire.allocate(self.sire.region(tag, "cpu", retain=True, clean=clean), [self.each] * PIECES))
            self.content.write(self.addresses[-1], self.each)
            if tag == self.tags[0]:
                self.sire.pause(tag)
        self.resident = 1
        self.first: list[float] = []

    def once(self, way: Way, timeline: Timeline | None = None) -> float:
        """The resident one goes, the other comes. Seconds that it took."""
        away, back = self.resident, 1 - self.resident
        taken = seconds(way, self.tags[away], self.tags[back], self.addresses[back][0], timeline)
        self.resident = back
        return taken

    def check(self, label: str) -> None:
        """Every byte of what came back."""
        wrong = self.content.wrong_blocks(self.addresses[self.resident], self.each)
        self.kit.wrong += [f"{label}: block {block}" for block in wrong]

    def serial(self, away: str, back: str, _first: int, _timeline: Timeline | None) -> None:
        """One after the other."""
        self.sire.pause(away)
        self.sire.resume(back)

    def switch(self, away: str, back: str, _first: int, _timeline: Timeline | None) -> None:
        """Both in one call."""
        self.sire.switch(away, back)

    def ahead(self, away: str, back: str, first: int, timeline: Timeline | None) -> None:
        """The resume in the background, until all is there."""
        start = time.perf_counter()
        self.sire.pause(away)
        coming = self.sire.resume_start(back)
        if timeline is not None:
            # Which closes it, because its thread asks until then.
            timeline.coming = coming
        coming.wait(first, self.each)
        self.first.append(time.perf_counter() - start)
        coming.wait()
        if timeline is None:
            coming.close()

    def close(self) -> None:
        """Gives everything back."""
        for address in [address for group in self.addresses for address in group]:
            self.sire.free(address)
        self.sire.trim()


def run(kit: Kit) -> None:
    """Everything dirty, and declared not to change."""
    size = kit.size(24 * GIB, 128 * MIB)
    known = 0.0
    for clean, kind in enumerate(("dirty", "clean")):
        if not kit.has(known, kind):
            continue
        to_host, to_device = plain_rates(kit.cuda(), size)
        pair = Pair(kit, size, clean)
        kit.notes[f"ballast.{kind}"] = occupy(pair.cuda, size // 8) if kit.big else 0
        out, back = 0.0 if clean else size / to_host / 1e9, size / to_device / 1e9
        for name, call, limit in (("serial", pair.serial, out + back), ("switch", pair.switch, max(out, back)), ("ahead", pair.ahead, out + back)):
            if kit.has(known, f"{name}.{kind}"):
                known = max(known, seconds(measure, pair, name, call, f"kit.switch.{name}.{kind}", limit))
        pair.close()


def measure(pair: Pair, name: str, call: Way, label: str, limit: float) -> None:
    """Cycles there and back, and one with a timeline."""
    kit, size = pair.kit, pair.each * PIECES
    times = []
    for _ in range(2 * CYCLES):
        times.append(pair.once(call))
        pair.check(label)
    kit.add(label, times, "s", bytes=size, limit_seconds=limit, share_of_limit=limit / statistics.median(times))
    if name == "ahead":
        kit.add(f"{label}.first", pair.first, "s", bytes=size, share_of_all=statistics.median(pair.first) / statistics.median(times))
        pair.first = []
    with Timeline(pair.cuda) as timeline:
        taken = pair.once(call, timeline)
    pair.check(label)
    kit.add(f"{label}.timeline", [taken], "s", bytes=size, milliseconds_free_ready=timeline.thinned())


def beside(kit: Kit) -> None:
    """How much slower fills of resident device memory get while another region is paused and resumed."""
    cuda, sire, size = kit.cuda(), kit.sire(), kit.size(8 * GIB, 128 * MIB)
    content, block = kit.content(cuda), kit.size(GIB, 8 * MIB)
    addresses = sire.allocate(sire.region("beside", "cpu", retain=True), [size // 8] * 8)
    content.write(addresses, size // 8)
    sire.pause("beside")
    sire.resume("beside")
    target, _ = cuda.mapped(block)
    stream, stop, counted = cuda.stream(), threading.Event(), [0]

    def fill() -> None:
        if cuda.context is not None:
            cuda.need("cuCtxSetCurrent", cuda.context)
        while not stop.is_set():
            cuda.need("cuMemsetD8Async", target, 3, block, stream)
            cuda.need("cuStreamSynchronize", stream)
            counted[0] += 1

    worker = threading.Thread(target=fill)
    worker.start()
    time.sleep(0.1)

    def rate(call: object) -> float:
        before, start = counted[0], time.perf_counter()
        if callable(call):
            call()
        return (counted[0] - before) * block / (time.perf_counter() - start) / 1e9

    alone = [rate(lambda: time.sleep(0.3)) for _ in range(3)]
    pauses, resumes = [], []
    for _ in range(3):
        pauses.append(rate(lambda: sire.pause("beside")))
        resumes.append(rate(lambda: sire.resume("beside")))
        kit.wrong += [f"beside: block {wrong}" for wrong in content.wrong_blocks(addresses, size // 8)]
    stop.set()
    worker.join()
    limit = max(alone)
    kit.add("kit.fills.alone", alone, "GB/s")
    kit.add("kit.fills.beside_pause", pauses, "GB/s", ceiling=limit)
    kit.add("kit.fills.beside_resume", resumes, "GB/s", ceiling=limit)
