"""Questions about cost: microseconds per virtual-memory call at several sizes, alone and beside a copy."""

from __future__ import annotations

import statistics
import time
from typing import Any

from .ask import Bench, question
from .cuda import GIB, MIB, Cuda

VERBS = ("create", "map", "set_access", "unmap", "release")
SIZES = (2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)


def _cycle(cuda: Cuda, address: int, size: int) -> dict[str, float]:
    """One physical's life, each step timed, in microseconds."""
    marks = [time.perf_counter_ns()]
    handle = cuda.create(size)
    marks.append(time.perf_counter_ns())
    cuda.map(address, size, handle, access=False)
    marks.append(time.perf_counter_ns())
    cuda.allow(address, size)
    marks.append(time.perf_counter_ns())
    cuda.need("cuMemUnmap", address, size)
    marks.append(time.perf_counter_ns())
    cuda.need("cuMemRelease", handle)
    marks.append(time.perf_counter_ns())
    return {verb: (after - before) / 1000 for verb, before, after in zip(VERBS, marks, marks[1:], strict=False)}


def _table(cuda: Cuda, label: str, *, big: bool) -> dict[str, Any]:
    figures, medians, repeats = [], {}, 40 if big else 4
    for size in SIZES if big else SIZES[:3]:
        address = cuda.reserve(size)
        _cycle(cuda, address, size)
        rounds = [_cycle(cuda, address, size) for _ in range(repeats)]
        for verb in VERBS:
            times = sorted(one[verb] for one in rounds)
            name = f"{label}.{verb}.{size // MIB}MiB"
            medians[name] = statistics.median(times)
            figures.append(
                {
                    "name": name,
                    "value": medians[name],
                    "unit": "us",
                    "samples": repeats,
                    "minimum": times[0],
                    "maximum": times[-1],
                }
            )
        cuda.need("cuMemAddressFree", address, size)
    return {"answer": {name: round(value, 1) for name, value in medians.items()}, "figures": figures}


@question("What does each virtual-memory call cost per physical of 2, 16, 64 and 256 MiB (median, microseconds)?")
def vmm_cost(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    return _table(cuda, "vmm", big=bench.big)


@question("What does each virtual-memory call cost while a copy keeps a stream of the same device busy?")
def vmm_cost_beside_copy(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = 256 * MIB if bench.big else 32 * MIB
    stream, host = cuda.stream(), cuda.host(size)
    target, _ = cuda.mapped(size)
    for _ in range(120 if bench.big else 8):
        cuda.need("cuMemcpyHtoDAsync_v2", target, host, size, stream)
    address, step = cuda.reserve(64 * MIB), 64 * MIB
    rounds: list[dict[str, float]] = []
    while cuda.call("cuStreamQuery", stream) == 600 and len(rounds) < 40:
        rounds.append(_cycle(cuda, address, step))
    ended = cuda.tell("cuStreamSynchronize", stream)
    if not rounds:
        return {"answer": None, "not_asked": "the copy was over before the first call"}
    found = {verb: statistics.median(one[verb] for one in rounds) for verb in VERBS}
    figures = [{"name": f"vmm.beside_copy.{verb}.64MiB", "value": value, "unit": "us", "samples": len(rounds)} for verb, value in found.items()]
    return {"answer": {verb: round(value, 1) for verb, value in found.items()}, "copy": ended, "figures": figures}


@question("How long do create, map, access, unmap and release of 1 GiB take in physicals of 2, 16, 64 and 256 MiB?")
def chunk_sizes(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    total = GIB if bench.big else 64 * MIB
    figures, answer = [], {}
    address = cuda.reserve(total)
    for chunk in (size for size in SIZES if size <= total):
        count = total // chunk
        start = time.perf_counter()
        handles = [cuda.create(chunk) for _ in range(count)]
        for index, handle in enumerate(handles):
            cuda.map(address + index * chunk, chunk, handle, access=False)
        cuda.allow(address, total)
        middle = time.perf_counter()
        for index, handle in enumerate(handles):
            cuda.need("cuMemUnmap", address + index * chunk, chunk)
            cuda.need("cuMemRelease", handle)
        end = time.perf_counter()
        for verb, seconds in (("take", middle - start), ("give_back", end - middle)):
            name = f"vmm.{verb}.per_GiB.{chunk // MIB}MiB"
            answer[name] = seconds * GIB / total
            figures.append({"name": name, "value": answer[name], "unit": "s", "samples": 1})
    return {"answer": answer, "bytes": total, "figures": figures}
