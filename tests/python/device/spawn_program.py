"""A program as others write it for torch_memory_saver: it starts a worker with ``spawn``, and the worker uses a region.

`test_spawned_workers.py` runs it. No line of it names Sire; the module comes from the second distribution.
Prints what the worker saw, as JSON. Argument: ``torch`` or ``preload``.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from contextlib import nullcontext
from typing import Any

from torch_memory_saver import configure_subprocess, torch_memory_saver

MIB = 1 << 20
SIZE = 48 * MIB


def work(results: Any, mode: str) -> None:
    """The worker: the same line imports the same module."""
    import torch

    torch_memory_saver.hook_mode = mode
    with torch_memory_saver.region(tag="worker", enable_cpu_backup=True):
        kept = torch.full((SIZE,), 42, dtype=torch.uint8, device="cuda")
    with torch_memory_saver.region(tag="scratch"):
        lost = torch.full((SIZE,), 7, dtype=torch.uint8, device="cuda")
    addresses = kept.data_ptr(), lost.data_ptr()
    free = [torch.cuda.mem_get_info()[0]]
    torch_memory_saver.pause()
    free.append(torch.cuda.mem_get_info()[0])
    torch_memory_saver.resume()
    free.append(torch.cuda.mem_get_info()[0])
    lost.fill_(8)
    results.put(
        {
            "module": sys.modules["torch_memory_saver"].__name__,
            "mode": torch_memory_saver.hook_mode,
            "preloaded": _maps("libsire_alloc.so"),
            "free": free,
            "same_addresses": addresses == (kept.data_ptr(), lost.data_ptr()),
            "kept": bool((kept == 42).all()),
            "usable": bool((lost == 8).all()),
        }
    )


def _maps(name: str) -> bool:
    with open("/proc/self/environ", "rb") as environ:
        return any(each.startswith(b"LD_PRELOAD=") and name.encode() in each for each in environ.read().split(b"\0"))


def main() -> None:
    """Starts the worker and prints its answer."""
    mode = sys.argv[1]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    worker = spawn.Process(target=work, args=(results, mode))
    with configure_subprocess() if mode == "preload" else nullcontext():
        worker.start()
    worker.join()
    print(json.dumps({"status": worker.exitcode} | (results.get() if worker.exitcode == 0 else {})))


if __name__ == "__main__":
    main()
