"""Pause and resume in every mode, against the plain copy of the same bytes, and beside the two patterns that others use.

`serial`: per allocation a fresh pinned buffer, a copy that is waited for, then unmap and release; on the way back create, map, a copy that
is waited for, and the buffer is freed. That is the pattern of savers that pin inside the pause. `serial_kept`: the same with buffers that
stay. Each figure has the `parts` of its last cycle, in seconds: pinning, copies and virtual-memory calls of the patterns, and what
Sire's report says of its own phases.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from .content import Content
from .cuda import GIB, MIB, Cuda
from .kit import Kit, plain_rates, seconds
from .sire_c import Sire

# name: backup, retained, clean
MODES: dict[str, tuple[str, bool, int]] = {
    "discard": ("none", False, 0),
    "host": ("cpu", False, 0),
    "retained": ("cpu", True, 0),
    "declared": ("cpu", True, 1),
    "verified": ("cpu", True, 2),
}
CYCLES = 4


Parts = dict[str, float]


class Subject(Protocol):
    """Allocations of one size that can be paused and resumed."""

    addresses: list[int]
    # Seconds of the last pause or resume, by what they went to.
    parts: Parts

    def pause(self) -> None:
        """Memory away."""

    def resume(self) -> None:
        """Memory back, and content where it was kept."""

    def close(self) -> None:
        """Gives everything back."""


class Serial:
    """Allocations that are copied one after the other, each copy waited for."""

    def __init__(self, cuda: Cuda, size: int, count: int, *, keep: bool) -> None:
        self.cuda, self.size, self.keep = cuda, size, keep
        self.addresses = [cuda.reserve(size) for _ in range(count)]
        self.handles = [cuda.create(size) for _ in range(count)]
        self.buffers: list[int] = []
        self.parts: Parts = {}
        for address, handle in zip(self.addresses, self.handles, strict=True):
            cuda.map(address, size, handle)

    def pause(self) -> None:
        """Everything to the host, memory away."""
        fresh, self.parts = not self.buffers, {}
        for index, (address, handle) in enumerate(zip(self.addresses, self.handles, strict=True)):
            if fresh:
                self._took("pinning", lambda: self.buffers.append(self.cuda.host(self.size)))
            self._took("copies", self.cuda.need, "cuMemcpyDtoH_v2", self.buffers[index], address, self.size)
            self._took("calls", self.cuda.need, "cuMemUnmap", address, self.size)
            self._took("calls", self.cuda.need, "cuMemRelease", handle)

    def resume(self) -> None:
        """Memory and content back."""
        self.handles, self.parts = [], {}
        for index, address in enumerate(self.addresses):
            self._took("calls", lambda: self.handles.append(self.cuda.create(self.size)))
            self._took("calls", self.cuda.map, address, self.size, self.handles[-1])
            self._took("copies", self.cuda.need, "cuMemcpyHtoD_v2", address, self.buffers[index], self.size)
            if not self.keep:
                self._took("pinning", self.cuda.need, "cuMemFreeHost", self.buffers[index])
        if not self.keep:
            self.buffers = []

    def _took(self, what: str, call: Callable[..., object], *arguments: object) -> None:
        self.parts[what] = self.parts.get(what, 0.0) + seconds(call, *arguments)

    def close(self) -> None:
        """Gives everything back."""
        for address, handle in zip(self.addresses, self.handles, strict=True):
            self.cuda.need("cuMemUnmap", address, self.size)
            self.cuda.need("cuMemRelease", handle)
            self.cuda.need("cuMemAddressFree", address, self.size)
        for buffer in self.buffers:
            self.cuda.need("cuMemFreeHost", buffer)


class Ours:
    """The same allocations in a region."""

    def __init__(self, sire: Sire, tag: str, mode: str, size: int, count: int) -> None:
        self.sire, self.tag = sire, tag
        backup, retain, clean = MODES[mode]
        region = sire.region(tag, backup, retain=retain, clean=clean)
        self.addresses = sire.allocate(region, [size] * count)
        self.copied: list[int] = []
        self.parts: Parts = {}

    def pause(self) -> None:
        """As the region's mode says."""
        report = self.sire.pause(self.tag)
        self.copied.append(int(report["bytes_copied"]))
        self.parts = phases(report)

    def resume(self) -> None:
        """Back."""
        self.parts = phases(self.sire.resume(self.tag))

    def close(self) -> None:
        """Gives everything back."""
        for address in self.addresses:
            self.sire.free(address)
        self.sire.trim()


def phases(report: dict[str, float]) -> Parts:
    """Seconds by phase, from a report."""
    return {name: float(report[f"seconds_{name}"]) for name in ("prepare", "synchronize", "transfer")}


def measure(kit: Kit, content: Content, subject: Subject, label: str, size: int, ceilings: tuple[float, float]) -> None:
    """Cycles of pause and resume; the first is the cold one; every byte is compared where a backup was made."""
    discards = label.startswith("discard")
    content.write(subject.addresses, size)
    times: dict[str, list[float]] = {"pause": [], "resume": []}
    parts: dict[str, list[Parts]] = {"pause": [], "resume": []}
    for _ in range(CYCLES):
        for verb, call in (("pause", subject.pause), ("resume", subject.resume)):
            times[verb].append(seconds(call))
            parts[verb].append(subject.parts)
        if not discards:
            wrong = content.wrong_blocks(subject.addresses, size)
            kit.wrong += [f"{label}: block {block}" for block in wrong]
    amount = size * len(subject.addresses)
    for (verb, found), ceiling in zip(times.items(), ceilings, strict=True):
        for phase, some in (("cold", slice(0, 1)), ("warm", slice(1, None))):
            took = found[some]
            more: dict[str, Any] = {"bytes": amount, "parts": parts[verb][some][-1]}
            name, middle = f"kit.{verb}.{label}.{phase}", statistics.median(took)
            if discards:
                kit.add(name, [each * 1e3 for each in took], "ms", None, seconds=middle, **more)
            else:
                kit.add(name, [amount / each / 1e9 for each in took], "GB/s", ceiling, seconds=middle, **more)


def makers(kit: Kit, cuda: Cuda, sire: Sire, amount: int, count: int) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """What is measured with so many allocations of so many bytes altogether."""
    size, label = amount // count, f"{amount >> 20}MiB.x{count}"
    for mode in MODES:
        yield f"{mode}.{label}", partial(Ours, sire, f"kit/{mode}.{label}", mode, size, count)
    yield f"serial_kept.{label}", partial(Serial, cuda, size, count, keep=True)
    # Pinning 32 GiB again and again takes half a minute, and tells no more than 8 do.
    if amount <= 8 * GIB:
        yield f"serial.{label}", partial(Serial, cuda, size, count, keep=False)


def run(kit: Kit) -> None:
    """Every mode and both patterns, for every size and number of allocations: the most telling first, for as long as there is time."""
    cuda, sire = kit.cuda(), kit.sire()
    content = kit.content(cuda)
    sizes = [(8 * GIB, 64), (32 * GIB, 64), (8 * GIB, 4096), (8 * GIB, 1)] if kit.big else [(128 * MIB, 16), (128 * MIB, 1)]
    room = cuda.free_memory()
    # Seconds per byte, by mode.
    known: dict[str, float] = {}
    for amount, count in sizes:
        if amount + GIB // 4 > room:
            kit.notes[f"{amount >> 30} GiB"] = f"left out: only {room} bytes are free"
            continue
        ceilings = plain_rates(cuda, amount)
        for label, make in makers(kit, cuda, sire, amount, count):
            mode = label.split(".", 1)[0]
            if kit.has(known.get(mode, 0.0) * amount, label):
                known[mode] = seconds(one, kit, content, label, make, amount // count, ceilings) / amount


def one(kit: Kit, content: Content, label: str, make: Callable[[], Subject], size: int, ceilings: tuple[float, float]) -> None:
    """From the first allocation to the last free."""
    subject = make()
    measure(kit, content, subject, label, size, ceilings)
    if isinstance(subject, Ours) and label.startswith(("declared", "verified")):
        kit.notes[f"{label}.bytes_copied"] = subject.copied[1:]
    subject.close()
