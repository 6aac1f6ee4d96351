"""Ceilings: what the link does by piece size, with one stream and two, in both directions at once; and what pinning costs by threads."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, c_char, c_void_p

from .cuda import GIB, KIB, MIB, Cuda
from .kit import Kit, rates, seconds

PIECES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
HUGEPAGE, NOHUGEPAGE = 14, 15
# CU_MEMHOSTREGISTER_PORTABLE
PORTABLE = 1


def queue(cuda: Cuda, name: str, piece: int, amount: int, host: int, target: int, streams: list[c_void_p]) -> None:
    """Copies of `piece` bytes, on the streams in turn."""
    for index, at in enumerate(range(0, amount, piece)):
        pair = (host + at, target + at) if "DtoH" in name else (target + at, host + at)
        cuda.need(name, *pair, piece, streams[index % len(streams)])


def run(kit: Kit) -> None:
    """Rates by piece size, streams and directions."""
    cuda, size, repeats = kit.cuda(), kit.size(GIB, 64 * MIB), 5 if kit.big else 3
    target, _ = cuda.mapped(size)
    host, streams = cuda.host(size), [cuda.stream(), cuda.stream()]
    best: dict[str, float] = {}
    for way, name in (("to_host", "cuMemcpyDtoHAsync_v2"), ("to_device", "cuMemcpyHtoDAsync_v2")):
        for piece in (piece for piece in PIECES if piece <= size):
            # So many small ones that the host is what limits; so few that it stays short.
            amount = min(size, piece * 2048)

            work = (cuda, name, piece, amount, host, target)
            rate = kit.add(f"limit.{way}.{piece // KIB}KiB", rates(cuda, amount, repeats, queue, *work, streams[:1]), "GB/s")
            best[way] = max(best.get(way, 0.0), rate)
            if piece == 64 * MIB:
                both = rates(cuda, amount, repeats, queue, *work, streams)
                kit.add(f"limit.{way}.two_streams", both, "GB/s", ceiling=rate)
    for kind, advice in (("huge", HUGEPAGE), ("small", NOHUGEPAGE)):
        with registered(cuda, size, advice) as start:
            for way, name in (("to_host", "cuMemcpyDtoHAsync_v2"), ("to_device", "cuMemcpyHtoDAsync_v2")):
                found = rates(cuda, size, repeats, queue, cuda, name, min(size, 64 * MIB), size, start, target, streams[:1])
                kit.add(f"limit.{way}.{kind}_pages", found, "GB/s", ceiling=best[way])
    half = size // 2

    def duplex() -> None:
        cuda.need("cuMemcpyDtoHAsync_v2", host, target, half, streams[0])
        cuda.need("cuMemcpyHtoDAsync_v2", target + half, host + half, half, streams[1])

    # 1.0: each direction as fast as alone.
    alone = half / best["to_host"] + half / best["to_device"]
    slowest = max(half / best["to_host"], half / best["to_device"])
    found = rates(cuda, size, repeats, duplex)
    kit.add("limit.duplex", found, "GB/s", ceiling=best["to_host"] + best["to_device"])
    taken = [size / rate for rate in found]
    kit.add("limit.duplex.efficiency", [slowest / each for each in taken], "share", gain=alone / min(taken))


def touch(start: int, region: mmap.mmap, length: int) -> None:
    """Writes to every page. Slicing copies inside C, which lets other threads run."""
    block = bytes(MIB)
    for at in range(start, start + length, MIB):
        region[at : at + MIB] = block


@contextmanager
def registered(cuda: Cuda, size: int, advice: int) -> Iterator[int]:
    """Memory of the system's, with this advice about its pages, touched and then registered with the driver: its address."""
    region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(advice)
    touch(0, region, size)
    start = addressof(c_char.from_buffer(region))
    cuda.need("cuMemHostRegister_v2", start, size, PORTABLE)
    try:
        yield start
    finally:
        cuda.need("cuCtxSynchronize")
        cuda.need("cuMemHostUnregister", start)


def run_all(workers: list[threading.Thread]) -> None:
    """Starts them, and waits for all."""
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def pinning(kit: Kit) -> None:
    """Seconds per GiB of `cuMemHostAlloc`, and of mapping, touching (by threads) and registering huge pages in slabs."""
    cuda, size = kit.cuda(), kit.size(8 * GIB, 64 * MIB)
    taken: list[int] = []
    per_gib = GIB / size
    kit.add("pinning.kit.host_alloc", [seconds(lambda: taken.append(cuda.host(size))) * per_gib], "s/GiB")
    kit.add("pinning.kit.host_free", [seconds(cuda.need, "cuMemFreeHost", taken[0]) * per_gib], "s/GiB")
    for threads in (1, 2, 4, 8, 16) if kit.big else (1, 2):
        region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(HUGEPAGE)
        share = size // threads
        workers = [threading.Thread(target=touch, args=(index * share, region, share)) for index in range(threads)]

        touched = seconds(run_all, workers)
        start, slab = addressof(c_char.from_buffer(region)), min(size, GIB)
        slabs = range(start, start + size, slab)
        registered = sum(seconds(cuda.need, "cuMemHostRegister_v2", at, slab, PORTABLE) for at in slabs)
        kit.add(f"pinning.kit.touch.{threads}_threads", [touched * per_gib], "s/GiB")
        kit.add(f"pinning.kit.register_after.{threads}_threads", [registered * per_gib], "s/GiB")
        for at in slabs:
            cuda.need("cuMemHostUnregister", at)
