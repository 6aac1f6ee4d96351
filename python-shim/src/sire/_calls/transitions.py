"""Pausing and resuming, and who makes way: `cdylib/abi/transition.rs`, `progress.rs` and `standing.rs`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_bool, c_size_t, c_uint64, c_void_p
from typing import Any

from .. import _interface
from .._errors import SireError
from .asked import Asked, DeadRanges, Ranges, array
from .loaded import Loaded

# Bytes of tags that a list of them has room for; what is longer is cut.
_LONGEST_LIST = 1 << 16


class Transitions(Loaded):
    """What takes memory away and brings it back."""

    def pause(
        self,
        tag: bytes | None,
        dead_ranges: DeadRanges | None = None,
        *,
        lazy: bool = False,
        idle: bool = False,
        alone: bool = False,
    ) -> dict[str, Any]:
        """Pauses; the fields of ``sire_report``. With ``lazy``, physical memory stays until somebody needs it. With
        ``idle``, the caller vouches that no work of a device uses the memory, and devices are not waited for. With
        ``alone``, what is under the tag is not meant.

        ``dead_ranges`` is asked which memory of the regions that are paused, given by number, holds nothing; what it
        raises is raised here, and nothing is paused.
        """
        report = _empty_report()
        wishes = (lazy, idle, alone)
        self._asking(dead_ranges, lambda options: self._call("sire_pause", tag, options, byref(report)), wishes)
        return _fields(report)

    def pre_copy(self, tag: bytes | None) -> dict[str, Any]:
        """Backs up what stays in use; the fields of ``sire_report``."""
        report = _empty_report()
        self._call("sire_pre_copy", tag, byref(report))
        return _fields(report)

    def switch(
        self, pause: bytes, resume: bytes, dead_ranges: DeadRanges | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Pauses one tag and resumes another; the fields of both reports."""
        left, came = _empty_report(), _empty_report()
        self._asking(
            dead_ranges,
            lambda options: self._call("sire_switch", pause, resume, options, byref(left), byref(came)),
        )
        return _fields(left), _fields(came)

    def _asking(
        self, dead_ranges: DeadRanges | None, call: Callable[[Any], None], wishes: tuple[bool, ...] = ()
    ) -> None:
        """Makes a call whose options hold the question; raises what the answer raised."""
        asked = Asked(dead_ranges)
        options = _interface.PauseOptions(ctypes.sizeof(_interface.PauseOptions), asked.function, None, *wishes)
        try:
            call(byref(options))
        except SireError:
            if asked.error is not None:
                raise asked.error from None
            raise

    def resume(
        self, tag: bytes | None, wait_seconds: float, order: Ranges | None = None, *, alone: bool = False
    ) -> dict[str, Any]:
        """Resumes, what is in ``order`` first; the fields of ``sire_report``. ``alone`` is as for `pause`."""
        report = _empty_report()
        self._call("sire_resume", tag, byref(_resume_options(wait_seconds, order, alone)), byref(report))
        return _fields(report)

    def resume_start(self, tag: bytes | None, wait_seconds: float, order: Ranges | None = None) -> int:
        """Starts a resume; the handle of its progress, which must be closed."""
        progress = c_void_p()
        self._call("sire_resume_start", tag, byref(_resume_options(wait_seconds, order)), byref(progress))
        return progress.value or 0

    def progress_ready(self, progress: int, pointer: int, size: int) -> bool:
        """Whether the range can be used."""
        ready = c_bool()
        self._call("sire_progress_ready", progress, pointer, size, byref(ready))
        return ready.value

    def progress_wait(self, progress: int, pointer: int, size: int, timeout_seconds: float) -> bool:
        """Waits for the range; with pointer 0, for the end."""
        ready = c_bool()
        self._call("sire_progress_wait", progress, pointer, size, timeout_seconds, byref(ready))
        return ready.value

    def progress_wait_stream(
        self, progress: int, pointer: int, size: int, device: int, stream: int, timeout_seconds: float
    ) -> bool:
        """Has a stream wait for the range, once that is queued; with pointer 0, for all."""
        queued = c_bool()
        self._call("sire_progress_wait_stream", progress, pointer, size, device, stream, timeout_seconds, byref(queued))
        return queued.value

    def progress_report(self, progress: int) -> dict[str, Any]:
        """What the resume did."""
        report = _empty_report()
        self._call("sire_progress_report", progress, byref(report))
        return _fields(report)

    def progress_bytes(self, progress: int) -> tuple[int, int]:
        """Bytes that are ready, and all of them."""
        ready, total = c_uint64(), c_uint64()
        self._call("sire_progress_bytes", progress, byref(ready), byref(total))
        return ready.value, total.value

    def progress_cancel(self, progress: int) -> None:
        """Makes the resume stop."""
        self._call("sire_progress_cancel", progress)

    def progress_close(self, progress: int) -> None:
        """Ends the handle."""
        self._call("sire_progress_close", progress)

    def promote(self, tag: bytes | None) -> int:
        """Brings automatic backups back into host memory; the bytes that moved."""
        moved = c_size_t()
        self._call("sire_promote", tag, byref(moved))
        return moved.value

    def cancel(self) -> None:
        """Makes a running pause or resume stop and roll back."""
        self._call("sire_cancel")

    def standing_set(self, tag: bytes | None, priority: int, pinned: bool, keep_alive_seconds: float) -> None:
        """What is said about who makes way."""
        standing = _interface.Standing(ctypes.sizeof(_interface.Standing), priority, pinned, keep_alive_seconds)
        self._call("sire_standing_set", tag, byref(standing))

    def lease(self, tag: bytes | None) -> None:
        """Somebody uses the tag."""
        self._call("sire_lease", tag)

    def unlease(self, tag: bytes | None) -> None:
        """Ends one `lease`."""
        self._call("sire_unlease", tag)

    def budget_set(self, device: int, limit: int, headroom: int, residency_seconds: float) -> None:
        """What `make_room` may use of a device; limit 0: what there is."""
        budget = _interface.Budget(ctypes.sizeof(_interface.Budget), limit, headroom, residency_seconds)
        self._call("sire_budget_set", device, byref(budget))

    def budget(self, device: int) -> tuple[int, int, float]:
        """Limit (0: what there is), headroom and seconds of residency of a device, as this program or somebody outside
        has set them last.
        """
        budget = _interface.Budget(ctypes.sizeof(_interface.Budget))
        self._call("sire_budget_get", device, byref(budget))
        return budget.limit_bytes, budget.headroom_bytes, budget.residency_seconds

    def make_room(self, device: int, size: int) -> tuple[int, list[str]]:
        """What regions that nobody uses gave back so that there is room, and their tags."""
        given, length = c_size_t(), c_size_t()
        buffer = ctypes.create_string_buffer(_LONGEST_LIST)
        self._call("sire_make_room", device, size, byref(given), buffer, len(buffer), byref(length))
        return given.value, buffer.value.decode(errors="replace").split("\n") if length.value else []


def _empty_report() -> _interface.ReportStruct:
    return _interface.ReportStruct(ctypes.sizeof(_interface.ReportStruct))


def _fields(report: _interface.ReportStruct) -> dict[str, Any]:
    return {name: getattr(report, name) for name, *_ in _interface.ReportStruct._fields_ if name != "struct_size"}


def _resume_options(wait_seconds: float, order: Ranges | None, alone: bool = False) -> _interface.ResumeOptions:
    ranges = array(order or [])
    return _interface.ResumeOptions(ctypes.sizeof(_interface.ResumeOptions), wait_seconds, ranges, len(ranges), alone)
