"""What the device and the operating system say about memory, beside what Sire says about itself."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
# PyTorch before 2.10 reads only the older name, and does not say so (pytorch#183387).
_ONE_NAME = torch.__version__ < (2, 10)
ALLOC_CONF = "PYTORCH_CUDA_ALLOC_CONF" if _ONE_NAME else "PYTORCH_ALLOC_CONF"
# No pool with another allocator is there beside expandable segments.
BEFORE_2_11 = torch.__version__ < (2, 11)


@cache
def _stand_in() -> Any | None:
    """The software device's runtime, if that is what PyTorch runs on."""
    major = torch.version.cuda.split(".")[0]
    runtime = ctypes.CDLL(f"libcudart.so.{major}")
    return runtime if hasattr(runtime, "sire_sim_used") else None


def on_software_device() -> bool:
    """Whether the device is the software one."""
    return _stand_in() is not None


def driver_of_software_device() -> str | None:
    """The path of the software device's libcuda; None on other devices."""
    if not on_software_device():
        return None
    packages = Path(torch.__file__).resolve().parents[1]
    [path] = packages.glob("nvidia/cu*/lib/libcuda.so.1")
    return str(path)


def device_used() -> int:
    """Physical bytes in use on the current device, without PyTorch's cache of the default pool.

    The software device's own count, or the driver's.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    runtime = _stand_in()
    if runtime is not None:
        runtime.sire_sim_used.restype = ctypes.c_uint64
        runtime.sire_sim_used.argtypes = [ctypes.c_int]
        return int(runtime.sire_sim_used(torch.cuda.current_device()))
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def device_blocks() -> int | None:
    """Bytes that the operating system holds for the software device's memory files; None on other devices."""
    if not on_software_device():
        return None
    sizes: dict[int, int] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
            if "memfd:" in target and "sire" in target:
                status = entry.stat()
                sizes[status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return sum(sizes.values())


def host_used() -> int:
    """This process's anonymous resident memory."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not report RssAnon")


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def stranger(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor in no region: with the library as the whole process's allocator, only `sire.disable` makes one."""
    import sire

    if os.environ.get("SIRE_TEST_MODE") != "allocator":
        return make()
    with sire.disable():
        return make()


def region_bytes(tag: str) -> dict[str, int]:
    """The library's counts of a tag, summed over its policies."""
    import sire

    found = [each for each in sire.stats()["regions"] if each["tag"] == tag]
    names = ("allocations", "requested_bytes", "resident_bytes", "paused_bytes", "backup_bytes", "stored_bytes")
    return {name: sum(int(each[name]) for each in found) for name in names}


def command_or_skip() -> Path:
    """The `sire` command, beside the library that is tested."""
    import pytest
    import sire

    named = os.environ.get("SIRE_COMMAND")
    found = Path(named) if named else sire.library_path().with_name("sire")
    if not found.is_file():
        pytest.skip(f"the command is not at {found}; name it in SIRE_COMMAND")
    return found


def is_gone_at_once(make: Callable[[], weakref.ref[Any]]) -> bool:
    """Whether nothing has what it made when it returns, before garbage is collected."""
    gc.collect()
    gc.disable()
    try:
        return make()() is None
    finally:
        gc.enable()
