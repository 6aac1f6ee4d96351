"""The library in this process: settings, hooks, statistics, caches. `cdylib/abi/process.rs` and `cache.rs`."""

from __future__ import annotations

import json
import os
from ctypes import byref, c_int32, c_size_t
from typing import Any

from .loaded import Loaded


class InProcess(Loaded):
    """What concerns no single region."""

    disk_directory: str | None = None

    def set_margin(self, size: int) -> None:
        """Device memory that Sire leaves free."""
        self._call("sire_set_margin", size)

    def set_disk_directory(self, path: bytes) -> None:
        """Directory of disk backups."""
        self._call("sire_set_disk_directory", path)
        self.disk_directory = os.fsdecode(path)

    def trim(self) -> tuple[int, int]:
        """Frees what is only cached: (device bytes, host bytes)."""
        device, host = c_size_t(), c_size_t()
        self._call("sire_trim", byref(device), byref(host))
        return device.value, host.value

    def hook_live(self) -> bool:
        """Whether this process's cudaMalloc reaches the library."""
        live = c_int32()
        self._call("sire_hook_probe", byref(live))
        return live.value == 1

    def driver_hook_live(self) -> bool:
        """Whether look-ups of the driver's functions in this process reach the library."""
        live = c_int32()
        self._call("sire_driver_hook_probe", byref(live))
        return live.value == 1

    def stats(self) -> dict[str, Any]:
        """Everything observable."""
        found: dict[str, Any] = json.loads(self._text("sire_stats_json"))
        return found

    def memory_stats(self, device: int) -> dict[str, int]:
        """What a device's cache counts."""
        found: dict[str, int] = json.loads(self._text("sire_memory_stats_json", device))
        return found

    def memory_snapshot(self) -> list[dict[str, Any]]:
        """Segments and blocks of all caches."""
        found: list[dict[str, Any]] = json.loads(self._text("sire_memory_snapshot_json"))
        return found

    def memory_stats_reset(self, device: int, accumulated: bool) -> None:
        """Peaks, or what has come and gone, from now on."""
        self._call("sire_memory_stats_reset", device, accumulated)

    def empty_cache(self) -> int:
        """Gives the driver what caches hold free; the bytes."""
        size = c_size_t()
        self._call("sire_empty_cache", byref(size))
        return size.value

    def capture_begin(self) -> None:
        """A stream capture begins that no hook sees."""
        self._call("sire_capture_begin")

    def capture_end(self) -> None:
        """Ends one `capture_begin`."""
        self._call("sire_capture_end")
