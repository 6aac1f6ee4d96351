"""Two models that do not fit together: how long it takes to put one down and pick the other up. And what a pause costs work that runs beside it."""

from __future__ import annotations

import statistics
import threading
import time

from .content import Content
from .cuda import GIB, MIB, Cuda
from .interference import occupy
from .kit import Kit, plain_rates, seconds
from .sire_c import Sire, SireError

CYCLES = 3


def models(cuda: Cuda, sire: Sire, size: int, clean: int) -> tuple[Content, list[list[int]]]:
    """Two of `size` bytes in 16 allocations each; the second is resident, and there is room for one and a little."""
    content, found = Content(cuda), []
    for tag in ("a", "b"):
        region = sire.region(f"switch{clean}/{tag}", "cpu", retain=True, clean=clean)
        found.append(sire.allocate(region, [size // 16] * 16))
        content.write(found[-1], size // 16)
        if tag == "a":
            sire.pause(f"switch{clean}/a")
    return content, found


def check(kit: Kit, content: Content, addresses: list[int], each: int, label: str) -> None:
    """Every byte of what came back."""
    kit.wrong += [f"{label}: block {block}" for block in content.wrong_blocks(addresses, each)]


def run(kit: Kit) -> None:
    """One after the other, and in one call where the library has it; everything dirty, and declared not to change."""
    size = kit.size(24 * GIB, 128 * MIB)
    for clean in (0, 1):
        cuda, sire = kit.cuda(), kit.sire()
        to_host, to_device = plain_rates(cuda, size)
        try:
            content, addresses = models(cuda, sire, size, clean)
        except SireError as error:
            kit.notes["clean"] = f"not offered: {error}"
            return
        ballast = occupy(cuda, size // 8) if kit.big else 0
        kit.notes[f"ballast.{clean}"] = ballast
        kind = "clean" if clean else "dirty"
        tags = [f"switch{clean}/a", f"switch{clean}/b"]
        serial_limit = size / to_device / 1e9 + (0 if clean else size / to_host / 1e9)
        duplex_limit = max(size / to_device / 1e9, 0 if clean else size / to_host / 1e9)

        ways = {"serial": (sire.pause_and_resume, serial_limit)}
        if sire.can_switch:
            ways["switch"] = (sire.switch, duplex_limit)
        for name, (call, limit) in ways.items():
            times = []
            for cycle in range(2 * CYCLES):
                # The second is resident first.
                away, back = (1, 0) if cycle % 2 == 0 else (0, 1)
                times.append(seconds(call, tags[away], tags[back]))
                check(kit, content, addresses[back], size // 16, f"{name} {kind}")
            share = limit / statistics.median(times)
            kit.add(f"kit.switch.{name}.{kind}", times, "s", bytes=size, limit_seconds=limit, share_of_limit=share)
        for group in addresses:
            for address in group:
                sire.free(address)
        sire.trim()


def beside(kit: Kit) -> None:
    """How much slower fills of resident device memory get while another region is paused and resumed."""
    cuda, sire, size = kit.cuda(), kit.sire(), kit.size(8 * GIB, 128 * MIB)
    content, block = Content(cuda), kit.size(GIB, 8 * MIB)
    addresses = sire.allocate(sire.region("beside", "cpu", retain=True), [size // 8] * 8)
    content.write(addresses, size // 8)
    sire.pause("beside")
    sire.resume("beside")
    target, _ = cuda.mapped(block)
    stream, stop, counted = cuda.stream(), threading.Event(), [0]

    def fill() -> None:
        if cuda.context is not None:
            cuda.need("cuCtxSetCurrent", cuda.context)
        while not stop.is_set():
            cuda.need("cuMemsetD8Async", target, 3, block, stream)
            cuda.need("cuStreamSynchronize", stream)
            counted[0] += 1

    worker = threading.Thread(target=fill)
    worker.start()
    time.sleep(0.1)

    def rate(call: object) -> float:
        before, start = counted[0], time.perf_counter()
        if callable(call):
            call()
        return (counted[0] - before) * block / (time.perf_counter() - start) / 1e9

    alone = [rate(lambda: time.sleep(0.3)) for _ in range(3)]
    pauses, resumes = [], []
    for _ in range(3):
        pauses.append(rate(lambda: sire.pause("beside")))
        resumes.append(rate(lambda: sire.resume("beside")))
        kit.wrong += [f"beside: block {wrong}" for wrong in content.wrong_blocks(addresses, size // 8)]
    stop.set()
    worker.join()
    limit = max(alone)
    kit.add("kit.fills.alone", alone, "GB/s")
    kit.add("kit.fills.beside_pause", pauses, "GB/s", ceiling=limit)
    kit.add("kit.fills.beside_resume", resumes, "GB/s", ceiling=limit)
