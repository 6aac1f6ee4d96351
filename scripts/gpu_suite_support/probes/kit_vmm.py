"""What virtual-memory calls cost: by size of the physical, by threads, when memory is fresh, was just released, or is kept and mapped again;
per handle or over a range; and whether an unmap waits for a kernel that has nothing to do with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .cuda import GIB, MIB, Cuda
from .kernels import Kernels, keep_busy
from .kit import Kit

SIZES = (2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
VERBS = ("create", "map", "access", "unmap", "release")


def microseconds(call: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    start = time.perf_counter_ns()
    call(*arguments)
    return (time.perf_counter_ns() - start) / 1e3


def bare_map(cuda: Cuda, place: int, size: int, handle: int) -> None:
    """Maps without giving access."""
    cuda.map(place, size, handle, access=False)


def lives(cuda: Cuda, size: int, count: int) -> dict[str, list[float]]:
    """`count` physicals side by side, each call timed."""
    found: dict[str, list[float]] = {verb: [] for verb in VERBS}
    base = cuda.reserve(size * count)
    places = range(base, base + size * count, size)
    handles: list[int] = []
    for _ in places:
        found["create"].append(microseconds(lambda: handles.append(cuda.create(size))))
    for place, handle in zip(places, handles, strict=True):
        found["map"].append(microseconds(bare_map, cuda, place, size, handle))
    for place in places:
        found["access"].append(microseconds(cuda.allow, place, size))
    for place in places:
        found["unmap"].append(microseconds(cuda.need, "cuMemUnmap", place, size))
    for handle in handles:
        found["release"].append(microseconds(cuda.need, "cuMemRelease", handle))
    cuda.need("cuMemAddressFree", base, size * count)
    return found


def by_size(kit: Kit, cuda: Cuda) -> None:
    """Each call alone."""
    for size in SIZES if kit.big else SIZES[:3]:
        count = max(4, min(64, 8 * GIB // size)) if kit.big else 4
        lives(cuda, size, 2)
        for verb, times in lives(cuda, size, count).items():
            kit.add(f"vmm.kit.{verb}.{size // MIB}MiB", times, "us")


def range_access(kit: Kit, cuda: Cuda) -> None:
    """One `cuMemSetAccess` over many handles, per handle."""
    size, count = 2 * MIB, 512 if kit.big else 16
    base = cuda.reserve(size * count)
    handles = [cuda.create(size) for _ in range(count)]
    for index, handle in enumerate(handles):
        cuda.map(base + index * size, size, handle, access=False)
    whole = microseconds(cuda.allow, base, size * count)
    kit.add("vmm.kit.access_over_a_range.2MiB", [whole / count], "us", handles=count)
    for index, handle in enumerate(handles):
        cuda.need("cuMemUnmap", base + index * size, size)
        cuda.need("cuMemRelease", handle)
    cuda.need("cuMemAddressFree", base, size * count)


def history(kit: Kit, cuda: Cuda) -> None:
    """Creating 64 MiB when nothing was released lately, right after a full device was, and mapping again what was kept."""
    size = 64 * MIB if kit.big else 16 * MIB
    time.sleep(1.0 if kit.big else 0.0)
    handles: list[int] = []
    fresh = [microseconds(lambda: handles.append(cuda.create(size))) for _ in range(16 if kit.big else 3)]
    kit.add("vmm.kit.create.fresh", fresh, "us", bytes=size)
    while cuda.free_memory() > size + 512 * MIB:
        handles.append(cuda.create(size))
    if not kit.big:
        handles += [cuda.create(size) for _ in range(2)]
    for handle in handles:
        cuda.need("cuMemRelease", handle)
    handles = []
    after = [microseconds(lambda: handles.append(cuda.create(size))) for _ in range(64 if kit.big else 3)]
    kit.add("vmm.kit.create.after_a_full_device", after, "us", bytes=size)
    base = cuda.reserve(size)
    again = []
    for handle in handles:
        again.append(microseconds(cuda.map, base, size, handle))
        cuda.need("cuMemUnmap", base, size)
    kit.add("vmm.kit.map_and_access.recycled", again, "us", bytes=size)
    for handle in handles:
        cuda.need("cuMemRelease", handle)
    cuda.need("cuMemAddressFree", base, size)


def by_threads(kit: Kit, cuda: Cuda) -> None:
    """Physicals of 2 MiB taken and given back per second by several threads: does the driver let them run side by side?"""
    count = 256 if kit.big else 8
    alone = 0.0
    lives(cuda, 2 * MIB, count)
    for threads in (1, 2, 4, 8) if kit.big else (1, 2):
        bases = [cuda.reserve(2 * MIB) for _ in range(threads)]

        def work(base: int) -> None:
            if cuda.context is not None:
                cuda.need("cuCtxSetCurrent", cuda.context)
            for _ in range(count):
                handle = cuda.create(2 * MIB)
                cuda.map(base, 2 * MIB, handle)
                cuda.need("cuMemUnmap", base, 2 * MIB)
                cuda.need("cuMemRelease", handle)

        workers = [threading.Thread(target=work, args=(base,)) for base in bases]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rate = threads * count / (time.perf_counter() - start)
        alone = alone or rate
        kit.add(f"vmm.kit.lives.{threads}_threads", [rate], "1/s", ceiling=alone * threads)
        for base in bases:
            cuda.need("cuMemAddressFree", base, 2 * MIB)


def beside_kernel(kit: Kit, cuda: Cuda) -> None:
    """The same calls while a kernel runs on a stream that has nothing to do with the memory."""
    size, stream = 64 * MIB if kit.big else 4 * MIB, cuda.stream()
    other, _ = cuda.mapped(size)
    base, handle = cuda.reserve(size), cuda.create(size)
    cuda.map(base, size, handle)
    cuda.need("cuCtxSynchronize")
    what = keep_busy(cuda, Kernels.load(cuda), stream, 0.5 if kit.big else 0.05, other, size)
    times = {
        "unmap": microseconds(cuda.need, "cuMemUnmap", base, size),
        "release": microseconds(cuda.need, "cuMemRelease", handle),
    }
    still_running = cuda.call("cuStreamQuery", stream) != 0
    cuda.need("cuCtxSynchronize")
    for verb, time_taken in times.items():
        kit.add(f"vmm.kit.{verb}.beside_a_kernel", [time_taken], "us")
    kit.notes |= {"beside": what, "unmap_waited_for_the_kernel": not still_running}


def run(kit: Kit) -> None:
    """All of them."""
    cuda = kit.cuda()
    for part in (by_size, range_access, history, by_threads, beside_kernel):
        part(kit, cuda)
