"""What other processes have to do with: reservations, marks, turns, and requests from outside. That is
`cdylib/abi/reserve.rs`, `reclaimable.rs`, `slices.rs` and `control.rs`.
"""

from __future__ import annotations

import ctypes
import json
import os
from ctypes import byref, c_bool, c_uint64, c_void_p
from typing import Any

from .. import _interface, _interrupt
from .._errors import raise_kept
from .asked import Asked, DeadRanges, Told, hearing
from .loaded import Loaded


class Others(Loaded):
    """Sharing a device with others, and being asked by them."""

    def reserve(
        self, device: int, size: int, margin: int, timeout_seconds: float, fence: int, preempt: int | None = None
    ) -> int:
        """Waits for a reservation (size 0: the device for this process alone); its handle, which must be released.

        ``preempt``: others are asked to give way, for a need of this priority.
        """
        asks = int(preempt is not None)
        options = _interface.ReserveOptions(
            ctypes.sizeof(_interface.ReserveOptions), size, margin, timeout_seconds, fence, None, asks, preempt or 0
        )
        reservation = c_void_p()
        self._call("sire_reserve", device, byref(options), byref(reservation))
        return reservation.value or 0

    def reservation_resize(self, reservation: int, size: int, timeout_seconds: float, fence: int) -> None:
        """Makes a reservation so large in all."""
        self._call("sire_reservation_resize", reservation, size, timeout_seconds, fence)

    def reservation_note_owned(self, reservation: int, size: int) -> None:
        """So many bytes of a reservation without a fence are this process's already."""
        self._call("sire_reservation_note_owned", reservation, size)

    def reservation_get(self, reservation: int) -> tuple[int, int, int]:
        """Bytes reserved, bytes behind the fence, and bytes that nothing uses yet."""
        report = _interface.ReservationReport(ctypes.sizeof(_interface.ReservationReport))
        self._call("sire_reservation_get", reservation, byref(report))
        return report.reserved_bytes, report.fenced_bytes, report.unused_bytes

    def reservation_release(self, reservation: int) -> None:
        """Ends it."""
        self._call("sire_reservation_release", reservation)

    def reservations(self, device: int) -> dict[str, Any]:
        """The device's UUID, and who has reserved what there."""
        found: dict[str, Any] = json.loads(self._text("sire_reservations_json", device, None))
        return found

    def reclaimable_open(
        self, tag: bytes, priority: int, after_idle: float, resume: bool, wait: bool, discard: bool
    ) -> int:
        """From now on a tag's memory gives way to others; the number of the mark."""
        size = ctypes.sizeof(_interface.ReclaimableOptions)
        options = _interface.ReclaimableOptions(size, priority, not resume, not wait, discard, after_idle)
        mark = c_uint64()
        self._call("sire_reclaimable_open", tag, byref(options), byref(mark))
        return mark.value

    def reclaimable_used(self, mark: int, seconds_ago: float) -> None:
        """The program has used it so long ago for the last time."""
        self._call("sire_reclaimable_used", mark, seconds_ago)

    def reclaimable_close(self, mark: int, told: Told | None = None) -> None:
        """Takes the consent back, and the memory; ``told`` hears of that, as at a safe point."""
        self._resuming("sire_reclaimable_close", told, mark)

    def reclaimable(self) -> list[dict[str, Any]]:
        """All marks of this process."""
        found: list[dict[str, Any]] = json.loads(self._text("sire_reclaimable_json"))
        return found

    def time_slice_open(self, device: int, quantum: float, group: bytes, timeout_seconds: float) -> None:
        """Joins those who take turns on a device, and waits for the first turn."""
        size = ctypes.sizeof(_interface.TimeSliceOptions)
        options = _interface.TimeSliceOptions(size, quantum, timeout_seconds, group, None)
        self._call("sire_time_slice_open", device, byref(options))

    def time_slice_close(self) -> None:
        """Takes turns no more."""
        self._call("sire_time_slice_close")

    def time_slice(self) -> dict[str, Any] | None:
        """Where this process is in its turns; None if it takes none."""
        figures: dict[str, Any] | None = json.loads(self._text("sire_time_slice_json"))
        return figures

    def control_open(self) -> str:
        """Opens the control socket; its path."""
        return os.fsdecode(self._text("sire_control_open"))

    def control_close(self, told: Told | None = None) -> None:
        """Closes it, and resumes what was paused from outside; ``told`` hears of that, as at a safe point."""
        self._resuming("sire_control_close", told)

    def control_give_up(self, told: Told | None = None) -> None:
        """Resumes what was paused from outside; ``told`` hears of that, as at a safe point."""
        self._resuming("sire_control_give_up", told)

    def _resuming(self, name: str, told: Told | None, *before: int) -> None:
        raised: list[BaseException] = []
        heard = hearing(told, raised)
        with _interrupt.deferred():
            self._call(name, *before, heard, None)
        raise_kept(raised)

    def control_wait(self, timeout_seconds: float) -> bool:
        """Waits until somebody wants the program's own figures."""
        asked = c_bool()
        self._call("sire_control_wait", timeout_seconds, byref(asked))
        return asked.value

    def control_publish(self, figures: bytes) -> None:
        """The program's own figures, as JSON."""
        self._call("sire_control_publish", figures)

    def safe_point(self, dead_ranges: DeadRanges | None, told: Told, slice_seconds: float) -> bool:
        """The calling thread is at a safe point; whether it must come back at once.

        ``told(what, tag)`` hears what happens: 0 before a pause, which false refuses; 1 after a resume; 2 when nothing
        was paused after all. What one of the two raises refuses the pause, and is raised when all is over.
        """
        raised: list[BaseException] = []
        asked, heard = Asked(dead_ranges), hearing(told, raised)
        size = ctypes.sizeof(_interface.SafePointOptions)
        options = _interface.SafePointOptions(size, asked.function, None, heard, None, slice_seconds)
        held = c_bool()
        with _interrupt.deferred():
            self._call("sire_safe_point", byref(options), byref(held))
        if asked.error is not None:
            raised.append(asked.error)
        raise_kept(raised)
        return held.value

    def safe_point_leave(self) -> None:
        """Nobody waits for the calling thread."""
        self._call("sire_safe_point_leave")
