"""Pause and resume in every mode, against the plain copy of the same bytes, and beside the two patterns that others use.

`serial`: per allocation a fresh pinned buffer, a copy that is waited for, then unmap and release; on the way back create, map, a copy that
is waited for, and the buffer is freed. That is the pattern of savers that pin inside the pause. `kept`: the same with buffers that stay.
"""

from __future__ import annotations

import statistics
from typing import Any

from .content import Content
from .cuda import GIB, MIB, Cuda
from .kit import Kit, plain_rates, seconds
from .sire_c import Sire, SireError

# name: backup, retained, clean
MODES: dict[str, tuple[str, bool, int]] = {
    "discard": ("none", False, 0),
    "host": ("cpu", False, 0),
    "retained": ("cpu", True, 0),
    "declared": ("cpu", True, 1),
    "verified": ("cpu", True, 2),
}
CYCLES = 4


class Serial:
    """Allocations that are copied one after the other, each copy waited for."""

    def __init__(self, cuda: Cuda, size: int, count: int, *, keep: bool) -> None:
        self.cuda, self.size, self.keep = cuda, size, keep
        self.addresses = [cuda.reserve(size) for _ in range(count)]
        self.handles = [cuda.create(size) for _ in range(count)]
        self.buffers: list[int] = []
        for address, handle in zip(self.addresses, self.handles, strict=True):
            cuda.map(address, size, handle)

    def pause(self) -> None:
        """Everything to the host, memory away."""
        fresh = not self.buffers
        for index, (address, handle) in enumerate(zip(self.addresses, self.handles, strict=True)):
            if fresh:
                self.buffers.append(self.cuda.host(self.size))
            self.cuda.need("cuMemcpyDtoH_v2", self.buffers[index], address, self.size)
            self.cuda.need("cuMemUnmap", address, self.size)
            self.cuda.need("cuMemRelease", handle)

    def resume(self) -> None:
        """Memory and content back."""
        self.handles = []
        for index, address in enumerate(self.addresses):
            self.handles.append(self.cuda.create(self.size))
            self.cuda.map(address, self.size, self.handles[-1])
            self.cuda.need("cuMemcpyHtoD_v2", address, self.buffers[index], self.size)
            if not self.keep:
                self.cuda.need("cuMemFreeHost", self.buffers[index])
        if not self.keep:
            self.buffers = []

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

    def pause(self) -> None:
        """As the region's mode says."""
        self.copied.append(int(self.sire.pause(self.tag)["bytes_copied"]))

    def resume(self) -> None:
        """Back."""
        self.sire.resume(self.tag)

    def close(self) -> None:
        """Gives everything back."""
        for address in self.addresses:
            self.sire.free(address)
        self.sire.trim()


def measure(kit: Kit, content: Content, subject: Any, label: str, size: int, ceilings: tuple[float, float]) -> None:
    """Cycles of pause and resume; the first is the cold one; every byte is compared where a backup was made."""
    discards = label.startswith("discard")
    content.write(subject.addresses, size)
    times: dict[str, list[float]] = {"pause": [], "resume": []}
    for _ in range(CYCLES):
        times["pause"].append(seconds(subject.pause))
        times["resume"].append(seconds(subject.resume))
        if not discards:
            wrong = content.wrong_blocks(subject.addresses, size)
            kit.wrong += [f"{label}: block {block}" for block in wrong]
    amount = size * len(subject.addresses)
    for (verb, found), ceiling in zip(times.items(), ceilings, strict=True):
        for phase, some in (("cold", found[:1]), ("warm", found[1:])):
            more = {"bytes": amount, "seconds": statistics.median(some)}
            name = f"kit.{verb}.{label}.{phase}"
            if discards:
                kit.add(name, [each * 1e3 for each in some], "ms", **more)
            else:
                kit.add(name, [amount / each / 1e9 for each in some], "GB/s", ceiling=ceiling, **more)


def run(kit: Kit) -> None:
    """Every mode, size and number of allocations, then the two patterns."""
    cuda, sire = kit.cuda(), kit.sire()
    content = Content(cuda)
    amounts = [(8 * GIB, (1, 64, 4096)), (32 * GIB, (64,))] if kit.big else [(128 * MIB, (1, 16))]
    room = cuda.free_memory()
    for amount, counts in amounts:
        if amount + GIB // 4 > room:
            kit.notes[f"{amount >> 30} GiB"] = f"left out: only {room} bytes are free"
            continue
        ceilings = plain_rates(cuda, amount)
        for count in counts:
            size = amount // count
            for mode in MODES if count == counts[0] or len(counts) == 1 else ("discard", "retained"):
                label = f"{mode}.{amount >> 20}MiB.x{count}"
                try:
                    subject = Ours(sire, f"kit/{label}", mode, size, count)
                except SireError as error:
                    kit.notes[label] = f"not offered: {error}"
                    continue
                measure(kit, content, subject, label, size, ceilings)
                if mode in ("declared", "verified"):
                    kit.notes[f"{label}.bytes_copied"] = subject.copied[1:]
                subject.close()
        count = counts[-1]
        for name, keep in (("serial", False), ("serial_kept", True)):
            if amount > 8 * GIB and not keep:
                continue
            serial = Serial(cuda, amount // count, count, keep=keep)
            measure(kit, content, serial, f"{name}.{amount >> 20}MiB.x{count}", amount // count, ceilings)
            serial.close()
