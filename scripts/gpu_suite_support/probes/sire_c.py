"""Sire's C ABI through ctypes (docs/abi.md): regions, allocations, pause and resume, without PyTorch and without the
package.
"""

from __future__ import annotations

import ctypes
import json
import math
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_double,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

BACKUPS = {"none": 0, "cpu": 1, "disk": 2}
OUT_OF_DEVICE_MEMORY = 2


class RegionOptions(Structure):
    """sire_region_options."""

    _fields_ = [("struct_size", c_size_t), ("backup", c_int32), ("zero_fill", c_bool), ("retain", c_bool), ("clean", c_int32)]


class PauseOptions(Structure):
    """sire_pause_options."""

    _fields_ = [("struct_size", c_size_t)]


class ResumeOptions(Structure):
    """sire_resume_options."""

    _fields_ = [("struct_size", c_size_t), ("wait_seconds", c_double)]


class ReportStruct(Structure):
    """sire_report."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("regions_changed", c_uint32),
        ("regions_unchanged", c_uint32),
        *[
            (name, c_uint64)
            for name in (
                "allocations",
                "bytes_expected",
                "bytes_moved",
                "bytes_copied",
                "bytes_discarded",
                "bytes_zeroed",
            )
        ],
        *[(name, c_double) for name in ("seconds_prepare", "seconds_synchronize", "seconds_transfer", "seconds_total")],
    ]

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {name: getattr(self, name) for name, *_ in self._fields_ if name != "struct_size"}


class SireError(Exception):
    """A call of Sire's that failed: `status` for programs, the sentence for people."""

    def __init__(self, status: int, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.status, self.name, self.message = status, name, message


_SIGNATURES: dict[str, list[Any]] = {
    "sire_region_open": [c_char_p, POINTER(RegionOptions), POINTER(c_uint32)],
    "sire_region_enter": [c_uint32, c_int32],
    "sire_region_leave": [c_uint32],
    "sire_allocate": [c_size_t, c_int32, c_void_p, POINTER(c_void_p)],
    "sire_free": [c_void_p],
    "sire_pause": [c_char_p, POINTER(PauseOptions), POINTER(ReportStruct)],
    "sire_resume": [c_char_p, POINTER(ResumeOptions), POINTER(ReportStruct)],
    "sire_trim": [POINTER(c_size_t), POINTER(c_size_t)],
    "sire_resume_start": [c_char_p, POINTER(ResumeOptions), POINTER(c_void_p)],
    "sire_progress_wait": [c_void_p, c_void_p, c_size_t, c_double, POINTER(c_bool)],
    "sire_progress_bytes": [c_void_p, POINTER(c_uint64), POINTER(c_uint64)],
    "sire_progress_close": [c_void_p],
    "sire_hook_probe": [POINTER(c_int32)],
}


class Coming:
    """A resume that goes on in the background."""

    def __init__(self, sire: Sire, handle: c_void_p) -> None:
        self._sire, self._handle = sire, handle

    def wait(self, address: int | None = None, size: int = 0) -> None:
        """Until these bytes can be used; without an address, until all is there."""
        ready = c_bool()
        self._sire.call("sire_progress_wait", self._handle, address, size, math.inf, byref(ready))

    def ready(self) -> int:
        """Bytes that can be used already."""
        found, total = c_uint64(), c_uint64()
        self._sire.call("sire_progress_bytes", self._handle, byref(found), byref(total))
        return found.value

    def close(self) -> None:
        """Nobody asks any more."""
        self._sire.call("sire_progress_close", self._handle)


class Sire:
    """The library."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        for name in ("sire_version", "sire_build_id"):
            getattr(self.library, name).restype = c_char_p
        self.library.sire_status_name.restype = c_char_p
        self.library.sire_status_name.argtypes = [c_int32]
        self.library.sire_last_error.restype = c_size_t
        self.library.sire_last_error.argtypes = [c_char_p, c_size_t]
        self.library.sire_stats_json.argtypes = [c_char_p, c_size_t, POINTER(c_size_t)]
        for name, arguments in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, c_int32

    def call(self, name: str, *arguments: Any) -> None:
        """A call that raises `SireError` unless it works."""
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            buffer = ctypes.create_string_buffer(4096)
            self.library.sire_last_error(buffer, 4096)
            raise SireError(status, self.library.sire_status_name(status).decode(), buffer.value.decode(errors="replace"))

    def identity(self) -> dict[str, Any]:
        """Version, build and ABI of the library."""
        return {
            "version": self.library.sire_version().decode(),
            "build_id": self.library.sire_build_id().decode(),
            "abi": int(self.library.sire_abi_version()),
        }

    def region(self, tag: str, backup: str, *, retain: bool = False, clean: int = 0) -> int:
        """Opens a region. `clean`: 1 declared not to change, 2 verified; an older library refuses both."""
        options = RegionOptions(ctypes.sizeof(RegionOptions), BACKUPS[backup], False, retain, clean)
        region = c_uint32()
        self.call("sire_region_open", tag.encode(), byref(options), byref(region))
        return region.value

    def allocate(self, region: int, sizes: list[int]) -> list[int]:
        """Allocations on device 0 in `region`."""
        self.call("sire_region_enter", region, 0)
        found = []
        try:
            for size in sizes:
                address = c_void_p()
                self.call("sire_allocate", size, 0, None, byref(address))
                found.append(int(address.value or 0))
        finally:
            self.call("sire_region_leave", region)
        return found

    def free(self, address: int) -> None:
        """Frees an allocation."""
        self.call("sire_free", address)

    def pause(self, tag: str) -> dict[str, Any]:
        """Pauses, and returns the report."""
        options, report = PauseOptions(ctypes.sizeof(PauseOptions)), ReportStruct(ctypes.sizeof(ReportStruct))
        self.call("sire_pause", tag.encode(), byref(options), byref(report))
        return report.as_dict()

    def resume(self, tag: str, wait_seconds: float = 0.0) -> dict[str, Any]:
        """Resumes, and returns the report."""
        options = ResumeOptions(ctypes.sizeof(ResumeOptions), wait_seconds)
        report = ReportStruct(ctypes.sizeof(ReportStruct))
        self.call("sire_resume", tag.encode(), byref(options), byref(report))
        return report.as_dict()

    def resume_start(self, tag: str) -> Coming:
        """Resumes in the background."""
        options, handle = ResumeOptions(ctypes.sizeof(ResumeOptions)), c_void_p()
        self.call("sire_resume_start", tag.encode(), byref(options), byref(handle))
        return Coming(self, handle)

    def trim(self) -> None:
        """Gives back what is only cached."""
        self.call("sire_trim", None, None)

    def pause_and_resume(self, away: str, back: str) -> None:
        """As a switch, in two calls."""
        self.pause(away)
        self.resume(back)

    def switch(self, away: str, back: str) -> None:
        """Pauses one tag and resumes another, in one call."""
        self.call("sire_switch", away.encode(), back.encode(), None, None, None)

    def stats(self) -> dict[str, Any]:
        """The statistics."""
        length = c_size_t()
        self.library.sire_stats_json(None, 0, byref(length))
        buffer = ctypes.create_string_buffer(length.value + 65536)
        self.library.sire_stats_json(buffer, len(buffer), byref(length))
        return dict(json.loads(buffer.value.decode()))
