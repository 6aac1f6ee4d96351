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


def main() -> int:
    """Runs one combination of size, number of allocations and backup."""
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
    options = parser.parse_args()

    cuda, sire = Cuda(options.driver), Sire(options.library)
    ceiling = plain_copy(cuda, options.bytes)
    content = Content(cuda)
    region = sire.region("suite", options.backup, retain=options.retain)
    size = options.bytes // options.allocations
    addresses = sire.allocate(region, [size] * options.allocations)
    content.write(addresses, size)
    resident = cuda.free_memory()

    wrong: list[int] = []
    times: dict[str, list[float]] = {"pause": [], "resume": []}
    reports: dict[str, Any] = {}
    given_back: list[int] = []
    for _ in range(options.cycles):
        seconds, reports["pause"] = timed(sire.pause, "suite")
        times["pause"].append(seconds)
        given_back.append(freed(cuda, resident, options.bytes))
        seconds, reports["resume"] = timed(sire.resume, "suite")
        times["resume"].append(seconds)
        if options.backup != "none":
            wrong += content.wrong_blocks(addresses, size)
    for address in addresses:
        sire.free(address)
    # Before and after, because a machine is not as fast all the time.
    ceiling = {way: max(rate, again) for (way, rate), again in zip(ceiling.items(), plain_copy(cuda, options.bytes).values(), strict=True)}

    figures = []
    for verb, direction in (("pause", "to_host"), ("resume", "to_device")):
        for phase, found in (("cold", times[verb][:1]), ("warm", times[verb][1:])):
            if not found:
                continue
            seconds = statistics.median(found)
            figure: dict[str, Any] = {
                "name": f"{verb}.{options.label}.{phase}",
                "samples": len(found),
                "seconds": seconds,
                "minimum": min(found),
                "maximum": max(found),
                "bytes": options.bytes,
            }
            if options.backup == "none":
                figures.append(figure | {"value": seconds * 1000, "unit": "ms"})
            else:
                figures.append(figure | {"value": options.bytes / seconds / 1e9, "unit": "GB/s", "ceiling": ceiling[direction]})
    print(
        json.dumps(
            {
                "figures": figures,
                "wrong": wrong,
                "given_back": given_back,
                "bytes": options.bytes,
                "reports": reports,
                "ceiling": ceiling,
            }
        ),
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
