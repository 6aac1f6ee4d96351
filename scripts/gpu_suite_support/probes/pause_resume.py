"""Measures pause and resume of `--bytes` through the C ABI, beside a plain pinned copy of as many bytes in the same
process.

Prints `{"figures": [...], "wrong": [...], ...}`. Every byte is compared after every resume of a region with a backup.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from .content import Content
from .cuda import MIB, Cuda
from .sire_c import Sire


def plain_copy(cuda: Cuda, size: int) -> dict[str, float]:
    """GB/s of plain pinned copies in the two directions: the ceiling. Best of five."""
    block = min(size, 256 * MIB)
    target, handle = cuda.mapped(block)
    stream, host = cuda.stream(), cuda.host(block)
    best = {"to_host": 0.0, "to_device": 0.0}
    for _ in range(6):
        for direction, name, arguments in (
            ("to_host", "cuMemcpyDtoHAsync_v2", (host, target)),
            ("to_device", "cuMemcpyHtoDAsync_v2", (target, host)),
        ):
            start = time.perf_counter()
            for _ in range(max(1, min(size // block, 8))):
                cuda.need(name, *arguments, block, stream)
            cuda.need("cuStreamSynchronize", stream)
            done = block * max(1, min(size // block, 8))
            best[direction] = max(best[direction], done / (time.perf_counter() - start) / 1e9)
    cuda.need("cuMemUnmap", target, block)
    cuda.need("cuMemRelease", handle)
    cuda.need("cuMemFreeHost", host)
    return best


def timed(call: Any, *arguments: Any) -> tuple[float, dict[str, Any]]:
    """Wall-clock seconds of a call, and its result."""
    start = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - start, result


def freed(cuda: Cuda, before: int, wanted: int) -> int:
    """Bytes that are free now and were not; a driver may take a moment to count them."""
    start = time.monotonic()
    while (found := cuda.free_memory() - before) < wanted and time.monotonic() - start < 0.5:
        time.sleep(0.005)
    return found


def arguments() -> argparse.Namespace:
    """One combination of size, number of allocations and backup."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--driver", required=True)
    parser.add_argument("--runtime", default="")
    parser.add_argument("--library", required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--allocations", type=int, default=4)
    parser.add_argument("--backup", choices=("none", "cpu"), required=True)
    parser.add_argument("--retain", action="store_true")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--label", required=True)
    return parser.parse_args()


@dataclass
class Found:
    """What the cycles showed: seconds of each pause and resume, the last reports, blocks with other bytes, and bytes given back."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"pause": [], "resume": []})
    reports: dict[str, Any] = field(default_factory=dict)
    wrong: list[int] = field(default_factory=list)
    given_back: list[int] = field(default_factory=list)


def cycles(options: argparse.Namespace, cuda: Cuda, sire: Sire) -> Found:
    """Pauses and resumes a region that is full."""
    found, content = Found(), Content(cuda)
    region = sire.region("suite", options.backup, retain=options.retain)
    size = options.bytes // options.allocations
    addresses = sire.allocate(region, [size] * options.allocations)
    content.write(addresses, size)
    resident = cuda.free_memory()
    for _ in range(options.cycles):
        seconds, found.reports["pause"] = timed(sire.pause, "suite")
        found.seconds["pause"].append(seconds)
        found.given_back.append(freed(cuda, resident, options.bytes))
        seconds, found.reports["resume"] = timed(sire.resume, "suite")
        found.seconds["resume"].append(seconds)
        if options.backup != "none":
            found.wrong += content.wrong_blocks(addresses, size)
    for address in addresses:
        sire.free(address)
    return found


def figure(options: argparse.Namespace, name: str, times: list[float], ceiling: float) -> dict[str, Any]:
    """Of several times: milliseconds where nothing is copied, else the rate, beside that of a plain copy."""
    seconds = statistics.median(times)
    told = {"name": name, "samples": len(times), "seconds": seconds, "minimum": min(times), "maximum": max(times), "bytes": options.bytes}
    if options.backup == "none":
        return told | {"value": seconds * 1000, "unit": "ms"}
    return told | {"value": options.bytes / seconds / 1e9, "unit": "GB/s", "ceiling": ceiling}


def main() -> int:
    """Runs one combination, and prints what it found as JSON."""
    options = arguments()
    cuda, sire = Cuda(options.driver), Sire(options.library)
    before = plain_copy(cuda, options.bytes)
    found = cycles(options, cuda, sire)
    # Before and after, because a machine is not as fast all the time.
    after = plain_copy(cuda, options.bytes)
    ceiling = {way: max(rate, after[way]) for way, rate in before.items()}
    figures = [
        figure(options, f"{verb}.{options.label}.{phase}", times, ceiling[direction])
        for verb, direction in (("pause", "to_host"), ("resume", "to_device"))
        for phase, times in (("cold", found.seconds[verb][:1]), ("warm", found.seconds[verb][1:]))
        if times
    ]
    told = {
        "figures": figures,
        "wrong": found.wrong,
        "given_back": found.given_back,
        "bytes": options.bytes,
        "reports": found.reports,
        "ceiling": ceiling,
    }
    print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
