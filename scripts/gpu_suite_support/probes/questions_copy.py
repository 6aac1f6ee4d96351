"""Questions about host memory and copies: rates of pinned, registered and pageable memory, both directions, and what
pinning costs.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable
from ctypes import addressof, c_char, c_void_p
from typing import Any

from .ask import Bench, question
from .cuda import GIB, MIB, Cuda

MADV_HUGEPAGE = 14


def _rate(cuda: Cuda, size: int, copy: Callable[[], None], repeats: int) -> list[float]:
    """GB/s of each of `repeats` copies, after one that does not count."""
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        copy()
        cuda.need("cuCtxSynchronize")
        rates.append(size / (time.perf_counter() - start) / 1e9)
    return rates[1:]


def _figure(name: str, rates: list[float]) -> dict[str, Any]:
    return {
        "name": name,
        "value": statistics.median(rates),
        "unit": "GB/s",
        "samples": len(rates),
        "minimum": min(rates),
        "maximum": max(rates),
    }


def _anonymous(size: int, *, huge: bool) -> mmap.mmap:
    region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        region.madvise(MADV_HUGEPAGE)
    return region


def _start(region: mmap.mmap) -> int:
    return addressof(c_char.from_buffer(region))


@question("How fast are copies from and to pinned, registered and pageable host memory, and both directions at once?")
def copy_rates(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size, repeats = (GIB, 7) if bench.big else (32 * MIB, 3)
    target, _ = cuda.mapped(size)
    first, second = cuda.stream(), cuda.stream()
    pinned = cuda.host(size)
    region = _anonymous(size, huge=True)
    pageable = _start(region)
    cuda.need("cuMemcpyDtoH_v2", pageable, target, size)
    rates = {
        "copy.pinned.to_device": _rate(cuda, size, lambda: cuda.need("cuMemcpyHtoDAsync_v2", target, pinned, size, first), repeats),
        "copy.pinned.to_host": _rate(cuda, size, lambda: cuda.need("cuMemcpyDtoHAsync_v2", pinned, target, size, first), repeats),
        "copy.pageable.to_device": _rate(cuda, size, lambda: cuda.need("cuMemcpyHtoD_v2", target, pageable, size), repeats),
        "copy.pageable.to_host": _rate(cuda, size, lambda: cuda.need("cuMemcpyDtoH_v2", pageable, target, size), repeats),
    }
    half = size // 2

    def both() -> None:
        cuda.need("cuMemcpyHtoDAsync_v2", target, pinned, half, first)
        cuda.need("cuMemcpyDtoHAsync_v2", pinned + half, target + half, half, second)

    rates["copy.pinned.both_directions"] = _rate(cuda, size, both, repeats)
    if cuda.call("cuMemHostRegister_v2", pageable, size, 0) == 0:
        rates["copy.registered.to_host"] = _rate(cuda, size, lambda: cuda.need("cuMemcpyDtoHAsync_v2", pageable, target, size, first), repeats)
        cuda.need("cuMemHostUnregister", pageable)
    figures = [_figure(name, found) for name, found in rates.items()]
    return {
        "answer": {figure["name"]: round(figure["value"], 2) for figure in figures},
        "bytes": size,
        "figures": figures,
    }


@question("How fast are pinned copies in pieces of 1, 4, 16 and 64 MiB with two in flight?")
def copy_pieces(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size, repeats = (GIB, 5) if bench.big else (64 * MIB, 3)
    target, _ = cuda.mapped(size)
    streams, pinned = [cuda.stream(), cuda.stream()], cuda.host(size)
    figures = []
    for piece in (MIB, 4 * MIB, 16 * MIB, 64 * MIB):

        def copy(piece: int = piece) -> None:
            for index in range(size // piece):
                stream = streams[index % 2]
                cuda.need("cuStreamSynchronize", stream)
                cuda.need("cuMemcpyDtoHAsync_v2", pinned + index * piece, target + index * piece, piece, stream)

        figures.append(_figure(f"copy.pieces.to_host.{piece // MIB}MiB", _rate(cuda, size, copy, repeats)))
    return {
        "answer": {figure["name"]: round(figure["value"], 2) for figure in figures},
        "bytes": size,
        "figures": figures,
    }


@question("What does pinning cost per GiB: cuMemHostAlloc, or cuMemHostRegister of memory mapped with small or huge pages?")
def pinning_cost(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = 2 * GIB if bench.big else 64 * MIB
    seconds: dict[str, float] = {}
    results: dict[str, str] = {}
    start = time.perf_counter()
    pointer = cuda.host(size)
    seconds["host_alloc"] = time.perf_counter() - start
    start = time.perf_counter()
    results["host_free"] = cuda.tell("cuMemFreeHost", c_void_p(pointer))
    seconds["host_free"] = time.perf_counter() - start
    for name, huge in (("small_pages", False), ("huge_pages", True)):
        region = _anonymous(size, huge=huge)
        address = _start(region)
        start = time.perf_counter()
        for offset in range(0, size, 4096):
            region[offset] = 1
        seconds[f"touch_{name}"] = time.perf_counter() - start
        start = time.perf_counter()
        results[f"register_{name}"] = cuda.tell("cuMemHostRegister_v2", address, size, 1)
        seconds[f"register_{name}"] = time.perf_counter() - start
        start = time.perf_counter()
        results[f"unregister_{name}"] = cuda.tell("cuMemHostUnregister", address)
        seconds[f"unregister_{name}"] = time.perf_counter() - start
    per_gib = {f"pinning.{name}": value * GIB / size for name, value in seconds.items() if not name.startswith("touch")}
    figures = [{"name": name, "value": value, "unit": "s/GiB", "samples": 1} for name, value in per_gib.items()]
    answer = {name: round(value, 4) for name, value in per_gib.items()}
    return {"answer": answer, "results": results, "bytes": size, "figures": figures}
