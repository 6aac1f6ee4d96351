"""What the probes of the kit share: one way to measure, one way to answer.

Run as `python -m gpu_suite_support.probes.kit PART --driver FILE --library FILE [--big] [--directory DIR] [--seconds N]`; each part is a
function in a `kit_*` module. It prints one line: `{"figures": [...], "wrong": [...], "notes": {...}}`. `wrong` lists blocks that did not
hold what was written there; anything in it fails the run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .content import Content
from .cuda import GIB, MIB, Cuda
from .sire_c import Sire

Figure = dict[str, Any]


@dataclass
class Kit:
    """What a part may use, and what it has found."""

    driver: str
    library: str
    big: bool
    directory: str = ""
    # When to have ended, by `time.monotonic`.
    deadline: float = math.inf
    figures: list[Figure] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def cuda(self) -> Cuda:
        """The driver."""
        return Cuda(self.driver)

    def sire(self) -> Sire:
        """The library."""
        return Sire(self.library)

    def content(self, cuda: Cuda) -> Content:
        """Bytes that can be verified, as fast as the link brings them."""
        return Content(cuda, 4 if self.big else 2)

    def has(self, seconds: float, what: str) -> bool:
        """Whether so much time is left; a note says what was left out if not."""
        wanted, left = max(seconds, 1.0), self.deadline - time.monotonic()
        if left < wanted:
            self.notes[what] = f"left out: it takes about {wanted:.0f} s, and {max(left, 0):.0f} s were left"
        return left >= wanted

    def size(self, big: int, small: int) -> int:
        """Bytes, on a GPU and on the software device."""
        return big if self.big else small

    def add(self, name: str, values: list[float], unit: str, ceiling: float | None = None, **more: Any) -> float:
        """A figure: the median of `values`, with its spread."""
        middle = statistics.median(values)
        found = {"name": name, "value": middle, "unit": unit, "samples": len(values)}
        found |= {"minimum": min(values), "maximum": max(values), **more}
        if ceiling is not None:
            found["ceiling"] = ceiling
        self.figures.append(found)
        return middle


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def rates(cuda: Cuda, amount: int, repeats: int, queue: Callable[..., object], *arguments: object) -> list[float]:
    """GB/s of what `queue` queues, waited for; the first time does not count."""

    def once() -> None:
        queue(*arguments)
        cuda.need("cuCtxSynchronize")

    return [amount / seconds(once) / 1e9 for _ in range(repeats + 1)][1:]


def many(cuda: Cuda, count: int, name: str, *arguments: object) -> None:
    """The same call `count` times."""
    for _ in range(count):
        cuda.need(name, *arguments)


def plain_rates(cuda: Cuda, size: int) -> tuple[float, float]:
    """The ceiling: GB/s of pinned copies of `size` bytes to the host and to the device, the best of five."""
    block = min(size, 256 * MIB)
    target, handle = cuda.mapped(block)
    stream, host = cuda.stream(), cuda.host(block)
    count = max(1, min(size, 4 * GIB) // block)
    best = []
    for name, first, second in (("cuMemcpyDtoHAsync_v2", host, target), ("cuMemcpyHtoDAsync_v2", target, host)):
        best.append(max(rates(cuda, count * block, 5, many, cuda, count, name, first, second, block, stream)))
    cuda.need("cuMemUnmap", target, block)
    cuda.need("cuMemRelease", handle)
    cuda.need("cuMemFreeHost", host)
    return best[0], best[1]


def parts() -> dict[str, Callable[[Kit], None]]:
    """Every part."""
    from . import kit_disk, kit_limits, kit_switch, kit_transfer, kit_vmm

    return {
        "limits": kit_limits.run,
        "pinning": kit_limits.pinning,
        "vmm": kit_vmm.run,
        "transfer": kit_transfer.run,
        "switch": kit_switch.run,
        "beside": kit_switch.beside,
        "disk": kit_disk.run,
    }


def main() -> int:
    """Runs one part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--driver", required=True)
    parser.add_argument("--runtime", default="")
    parser.add_argument("--library", required=True)
    parser.add_argument("--directory", default="")
    parser.add_argument("--big", action="store_true")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out what would take longer")
    options = parser.parse_args()
    kit = Kit(options.driver, options.library, options.big, options.directory, time.monotonic() + options.seconds)
    parts()[options.part](kit)
    print(json.dumps({"figures": kit.figures, "wrong": kit.wrong, "notes": kit.notes}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
