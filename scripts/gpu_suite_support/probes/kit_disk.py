"""The disk tier, beside what `O_DIRECT` does in the same folder with 1 to 16 requests of 4 MiB in flight."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .cuda import GIB, MIB
from .kit import Kit, seconds

REQUEST = 4 * MIB


def raw(folder: str, size: int, depth: int) -> tuple[float, float] | None:
    """GB/s of writing and of reading; nothing where the file system has no `O_DIRECT`."""
    try:
        handle, path = tempfile.mkstemp(dir=folder)
        os.close(handle)
        file = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return None
    os.unlink(path)
    try:
        os.posix_fallocate(file, 0, size)
        buffers = [mmap.mmap(-1, REQUEST) for _ in range(depth)]
        for buffer in buffers:
            buffer.write(os.urandom(4096) * (REQUEST // 4096))

        def all_requests(call: Callable[[int, int], int]) -> float:
            def worker(number: int) -> None:
                for at in range(number * REQUEST, size, depth * REQUEST):
                    call(number, at)

            with ThreadPoolExecutor(depth) as pool:
                return seconds(lambda: list(pool.map(worker, range(depth))))

        write = all_requests(lambda number, at: os.pwritev(file, [buffers[number]], at))
        write += seconds(lambda: os.fdatasync(file))
        read = all_requests(lambda number, at: os.preadv(file, [buffers[number]], at))
    except OSError:
        return None
    finally:
        os.close(file)
    return size / write / 1e9, size / read / 1e9


def run(kit: Kit) -> None:
    """Pause to disk and resume, and the best that the folder gives."""
    cuda, size = kit.cuda(), kit.size(8 * GIB, 64 * MIB)
    os.environ["SIRE_DISK_DIR"] = kit.directory
    sire = kit.sire()
    found = {depth: raw(kit.directory, size, depth) for depth in ((1, 2, 4, 8, 16) if kit.big else (1, 4))}
    rates = {depth: pair for depth, pair in found.items() if pair is not None}
    best: list[float | None] = [None, None]
    for depth, pair in rates.items():
        for index, way in enumerate(("write", "read")):
            kit.add(f"kit.disk.raw.{way}.depth_{depth}", [pair[index]], "GB/s")
            best[index] = max(best[index] or 0.0, pair[index])
    if not rates:
        kit.notes["disk"] = f"{kit.directory} has no O_DIRECT; there is no ceiling"
    content = kit.content(cuda)
    addresses = sire.allocate(sire.region("disk", "disk"), [size // 8] * 8)
    content.write(addresses, size // 8)
    writes, reads = [], []
    for _ in range(3):
        writes.append(size / seconds(lambda: sire.pause("disk")) / 1e9)
        reads.append(size / seconds(lambda: sire.resume("disk")) / 1e9)
        kit.wrong += [f"disk: block {block}" for block in content.wrong_blocks(addresses, size // 8)]
    kit.add("kit.disk.pause", writes, "GB/s", ceiling=best[0])
    kit.add("kit.disk.resume", reads, "GB/s", ceiling=best[1])
