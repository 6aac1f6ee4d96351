"""What the device and the operating system say about memory, independently of Sire's own counters.

On the software device the truth is the memfd that holds device memory: `st_blocks` counts the pages that the kernel
has really given it. On a GPU it is the driver's free-memory figure.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from functools import cache
from pathlib import Path
from types import TracebackType


def loaded_runtime() -> str:
    """Path of the CUDA runtime that this process has loaded (call after `import torch`).

    On the software device the kernel's list shows the file behind the link: the stand-in.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.search(r"/lib(cudart|sire_sim_cuda)[^/]*\.so", path):
            return path
    raise SystemExit("no CUDA runtime is loaded in this process")


class Device:
    """Device 0, as seen from outside Sire."""

    def __init__(self) -> None:
        self.runtime_path = loaded_runtime()
        self._runtime = ctypes.CDLL(self.runtime_path)
        self.software = hasattr(self._runtime, "sire_sim_used")
        self._memfd = self._find_memfd() if self.software else ""

    def _find_memfd(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        if self._runtime.sire_sim_memfd(0, buffer, ctypes.c_size_t(len(buffer))) != 0:
            raise SystemExit("the software device does not say where its memory is")
        return buffer.value.decode()

    def free_and_total(self) -> tuple[int, int]:
        """Bytes free and in all, by the driver, all processes counted."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        status = self._runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        if status != 0:
            raise SystemExit(f"cudaMemGetInfo failed with {status}")
        return free.value, total.value

    def used(self) -> int:
        """Bytes in use by the driver's count."""
        free, total = self.free_and_total()
        return total - free

    def blocks(self) -> int | None:
        """Bytes that the kernel has given the device's memfd; None on a GPU."""
        return os.stat(self._memfd).st_blocks * 512 if self.software else None

    def where_to_look(self) -> list[str]:
        """Commands for another terminal."""
        if not self.software:
            return ["watch -n 0.2 nvidia-smi --query-gpu=memory.used --format=csv"]
        return [
            f"watch -n 0.2 'stat -L -c %b*512 {self._memfd}'    # bytes of device memory that the kernel holds",
            f"grep -E 'Rss(Anon|Shmem)' /proc/{os.getpid()}/status",
        ]


@cache
def copy_rate() -> float:
    """Bytes per second of a plain copy, by one thread between two buffers that are there: the best of three."""
    count = 128 << 20
    source, target = ctypes.create_string_buffer(count), ctypes.create_string_buffer(count)
    ctypes.memset(source, 1, count)
    ctypes.memset(target, 2, count)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        ctypes.memmove(target, source, count)
        best = min(best, time.perf_counter() - started)
    return count / best


class Sampler:
    """Records (seconds, bytes used) every `interval` seconds while it is entered."""

    def __init__(self, device: Device, interval: float = 0.02) -> None:
        self.samples: list[tuple[float, int]] = []
        self.marks: list[tuple[float, str]] = []
        self._device, self._interval = device, interval
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            used = self._device.blocks()
            self.samples.append((time.monotonic() - self._start, self._device.used() if used is None else used))

    def mark(self, label: str) -> None:
        self.marks.append((time.monotonic() - self._start, label))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
