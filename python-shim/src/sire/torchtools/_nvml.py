"""What NVIDIA's management library says of a GPU, named by its UUID: memory, load, processes. It needs no CUDA
context, so that looking at a GPU costs nothing there. Where there is no such library, or it does not say, the answer
is None.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU, all processes together."""

    total: int
    free: int
    used: int


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


_UNKNOWN = 2**64 - 1


@cache
def _library() -> Any | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def _ask(uuid: str, name: str, *arguments: Any) -> bool:
    """Whether a function of a GPU's was answered."""
    library = _library()
    device = ctypes.c_void_p()
    if library is None or not hasattr(library, name):
        return False
    # A part of a GPU has its own kind of name.
    spellings = [uuid] if "-" in uuid[:4] else [f"GPU-{uuid}", f"MIG-{uuid}"]
    if all(library.nvmlDeviceGetHandleByUUID(each.encode(), ctypes.byref(device)) != 0 for each in spellings):
        return False
    return bool(getattr(library, name)(device, *arguments) == 0)


def memory(uuid: str) -> Memory | None:
    """The memory of a GPU."""
    found = _Memory()
    if not _ask(uuid, "nvmlDeviceGetMemoryInfo", ctypes.byref(found)):
        return None
    return Memory(int(found.total), int(found.free), int(found.used))


def load(uuid: str) -> int:
    """Per cent of the last moments in which a GPU worked; 0 if nobody knows."""
    found = _Utilization()
    return int(found.gpu) if _ask(uuid, "nvmlDeviceGetUtilizationRates", ctypes.byref(found)) else 0


def used_by(uuid: str, pid: int | None = None) -> int | None:
    """Bytes that a process (this one) has on a GPU; None if nobody knows, as from inside a container."""
    count = ctypes.c_uint(256)
    found = (_Process * 256)()
    if not _ask(uuid, "nvmlDeviceGetComputeRunningProcesses_v3", ctypes.byref(count), found):
        return None
    wanted = os.getpid() if pid is None else pid
    for each in found[: count.value]:
        if each.pid == wanted and each.used != _UNKNOWN:
            return int(each.used)
    return None
