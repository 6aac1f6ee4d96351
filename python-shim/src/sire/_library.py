"""The one door to ``libsire_alloc.so``: finding it, refusing a wrong one, and its functions with types.

A process must hold one copy of the library, whatever route it came by (preload, this package, PyTorch's
pluggable allocator): two copies would each know half of the allocations. So a copy that is already mapped is
the one to use, and if the package would have chosen a file with other content, loading is refused.

Every method of `Library` either returns the C function's outputs or raises the status as an exception.
"""

from __future__ import annotations

import ctypes
import filecmp
import json
import os
import threading
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _interface
from ._errors import LibraryNotFoundError, SireError, UnknownAddressError, VersionMismatchError, error_for
from ._version import __version__

LIBRARY_NAME = "libsire_alloc.so"
DRIVER_LIBRARY_NAME = "libsire_driver.so"
ABI_VERSION = 1
NO_REGION = 0xFFFFFFFF
# Bytes of tags that a list of them has room for; what is longer is cut.
_LONGEST_LIST = 1 << 16

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Allocation:
    """What the library knows about the allocation that holds an address."""

    base: int
    size: int
    device: int
    region: int


Ranges = list[tuple[int, int]]
DeadRanges = Callable[[list[int]], Ranges]


class Library:
    """The loaded library. Use `load`, which checks that it is the right one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.disk_directory: str | None = None
        try:
            self._c = ctypes.CDLL(path)
            self._plain_signatures()
        except (OSError, AttributeError) as error:
            raise LibraryNotFoundError(f"{path} cannot be loaded as Sire's library: {error}. {_ADVICE}") from error

    def _plain_signatures(self) -> None:
        c = self._c
        c.sire_abi_version.restype = c_uint32
        c.sire_version.restype = c_char_p
        c.sire_build_id.restype = c_char_p
        c.sire_last_error.argtypes = [c_char_p, c_size_t]
        c.sire_last_error.restype = c_size_t
        c.sire_owns.argtypes = [c_void_p]
        c.sire_owns.restype = c_bool

    def _complete_signatures(self) -> None:
        for name, arguments in _interface.SIGNATURES.items():
            function = getattr(self._c, name, None)
            if function is None:
                raise VersionMismatchError(f"{self.path} has no function {name}. {_ADVICE}")
            function.argtypes = arguments
            function.restype = c_int32

    def check(self, build_id: str | None) -> None:
        """Refuses a library that this package was not built for."""
        abi = int(self._c.sire_abi_version())
        if abi != ABI_VERSION:
            raise VersionMismatchError(
                f"{self.path} speaks version {abi} of the C interface, this package "
                f"(sire-alloc {__version__}) speaks {ABI_VERSION}. {_ADVICE}"
            )
        if self.version != __version__:
            raise VersionMismatchError(
                f"{self.path} is version {self.version}, this package is {__version__}. {_ADVICE}"
            )
        if build_id is not None and self.build_id != build_id:
            raise VersionMismatchError(
                f"{self.path} is build {self.build_id}, this package was built with {build_id}. {_ADVICE}"
            )
        self._complete_signatures()

    @property
    def version(self) -> str:
        """The library's version."""
        return str(self._c.sire_version().decode())

    @property
    def build_id(self) -> str:
        """A hash of the sources that the library was built from."""
        return str(self._c.sire_build_id().decode())

    @property
    def c(self) -> Any:
        """The functions themselves, for names that have no method here."""
        return self._c

    # --- calls -------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> None:
        status = int(getattr(self._c, name)(*arguments))
        if status != 0:
            raise error_for(status, self._last_error())

    def _last_error(self) -> str:
        length = int(self._c.sire_last_error(None, 0))
        buffer = ctypes.create_string_buffer(length + 1)
        self._c.sire_last_error(buffer, length + 1)
        return buffer.value.decode(errors="replace")

    def region_open(
        self, tag: bytes, backup: int, zero_fill: bool, retain: bool, clean: int = 0, pageable: bool = False
    ) -> int:
        """The region of this tag and policy, made if there is none."""
        options = _interface.RegionOptions(
            ctypes.sizeof(_interface.RegionOptions), backup, zero_fill, retain, clean, pageable
        )
        region = c_uint32()
        self._call("sire_region_open", tag, byref(options), byref(region))
        return region.value

    def region_enter(self, region: int, resume_if_paused: bool) -> None:
        """The calling thread goes inside."""
        self._call("sire_region_enter", region, int(resume_if_paused))

    def region_leave(self, region: int) -> None:
        """The calling thread leaves its innermost region."""
        self._call("sire_region_leave", region)

    def region_current(self) -> int | None:
        """The region in which the calling thread allocates."""
        region = c_uint32()
        self._call("sire_region_current", byref(region))
        return None if region.value == NO_REGION else region.value

    def region_suspend(self) -> None:
        """The calling thread's allocations pass through."""
        self._call("sire_region_suspend")

    def region_unsuspend(self) -> None:
        """Ends one `region_suspend`."""
        self._call("sire_region_unsuspend")

    def region_paused(self, region: int) -> bool:
        """Whether the region is paused."""
        state = c_int32()
        self._call("sire_region_state", region, byref(state))
        return state.value == 1

    def allocate(self, size: int, device: int, stream: int | None = None) -> int:
        """Memory in the calling thread's region."""
        pointer = c_void_p()
        self._call("sire_allocate", size, device, stream, byref(pointer))
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        """Frees what `allocate` returned."""
        self._call("sire_free", pointer)

    def owns(self, pointer: int) -> bool:
        """Whether the address lies in memory of the library's."""
        return bool(self._c.sire_owns(pointer))

    def allocation(self, pointer: int) -> Allocation:
        """The allocation that holds the address."""
        base, size, device, region = c_void_p(), c_size_t(), c_int32(), c_uint32()
        self._call("sire_allocation", pointer, byref(base), byref(size), byref(device), byref(region))
        return Allocation(base.value or 0, size.value, device.value, region.value)

    def keep(self, pointer: int, size: int) -> None:
        """The range is backed up at the next pause, whatever its region's policy."""
        self._call("sire_keep", pointer, size)

    def discard(self, pointer: int, size: int) -> None:
        """The range is thrown away at the next pause, whatever its region's policy."""
        self._call("sire_discard", pointer, size)

    def changed(self, pointer: int, size: int) -> None:
        """The range of a region that is declared not to change was written to."""
        self._call("sire_changed", pointer, size)

    def attach_file(self, pointer: int, size: int, path: bytes, offset: int) -> None:
        """The file holds the range from ``offset`` on."""
        self._call("sire_attach_file", pointer, size, path, offset)

    def require_usable(self, pointer: int) -> None:
        """Raises `PausedError` if the memory is away, `UnknownAddressError` if it is not the library's."""
        self._call("sire_require_usable", pointer)

    def keep_resident(self, pointer: int) -> int:
        """No pause takes the allocation that holds the address; its bytes."""
        size = c_size_t()
        self._call("sire_keep_resident", pointer, byref(size))
        return size.value

    def backup_get(self, pointer: int, size: int) -> tuple[int, int] | None:
        """(address of the backup, token to give back); None if there is no backup."""
        data, token = c_void_p(), c_void_p()
        try:
            self._call("sire_backup_get", pointer, size, byref(data), byref(token))
        except UnknownAddressError:
            return None
        return (data.value or 0, token.value or 0)

    def backup_put(self, token: int) -> None:
        """The backup of `backup_get` is not needed any more."""
        self._call("sire_backup_put", token)

    def pause(
        self, tag: bytes | None, dead_ranges: DeadRanges | None = None, *, lazy: bool = False, idle: bool = False
    ) -> dict[str, Any]:
        """Pauses; the fields of ``sire_report``. With ``lazy``, physical memory stays until somebody needs it. With
        ``idle``, the caller vouches that no work of a device uses the memory, and devices are not waited for.

        ``dead_ranges`` is asked which memory of the regions that are paused, given by number, holds nothing; what it
        raises is raised here, and nothing is paused.
        """
        report = _interface.ReportStruct(ctypes.sizeof(_interface.ReportStruct))
        self._asking(dead_ranges, lambda options: self._call("sire_pause", tag, options, byref(report)), lazy, idle)
        return _fields(report)

    def pre_copy(self, tag: bytes | None) -> dict[str, Any]:
        """Backs up what stays in use; the fields of ``sire_report``."""
        report = _interface.ReportStruct(ctypes.sizeof(_interface.ReportStruct))
        self._call("sire_pre_copy", tag, byref(report))
        return _fields(report)

    def switch(
        self, pause: bytes, resume: bytes, dead_ranges: DeadRanges | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Pauses one tag and resumes another; the fields of both reports."""
        left, came = (
            _interface.ReportStruct(ctypes.sizeof(_interface.ReportStruct)),
            _interface.ReportStruct(ctypes.sizeof(_interface.ReportStruct)),
        )
        self._asking(
            dead_ranges,
            lambda options: self._call("sire_switch", pause, resume, options, byref(left), byref(came)),
        )
        return _fields(left), _fields(came)

    def _asking(
        self, dead_ranges: DeadRanges | None, call: Callable[[Any], None], lazy: bool = False, idle: bool = False
    ) -> None:
        """Makes a call whose options hold the question; raises what the answer raised."""
        asked = _Asked(dead_ranges)
        options = _interface.PauseOptions(ctypes.sizeof(_interface.PauseOptions), asked.function, None, lazy, idle)
        try:
            call(byref(options))
        except SireError:
            if asked.error is not None:
                raise asked.error from None
            raise

    def resume(self, tag: bytes | None, wait_seconds: float, order: Ranges | None = None) -> dict[str, Any]:
        """Resumes, what is in ``order`` first; the fields of ``sire_report``."""
        report = _interface.ReportStruct(ctypes.sizeof(_interface.ReportStruct))
        self._call("sire_resume", tag, byref(_resume_options(wait_seconds, order)), byref(report))
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

    def progress_report(self, progress: int) -> dict[str, Any]:
        """What the resume did."""
        report = _interface.ReportStruct(ctypes.sizeof(_interface.ReportStruct))
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

    def make_room(self, device: int, size: int) -> tuple[int, list[str]]:
        """What regions that nobody uses gave back so that there is room, and their tags."""
        given, length = c_size_t(), c_size_t()
        buffer = ctypes.create_string_buffer(_LONGEST_LIST)
        self._call("sire_make_room", device, size, byref(given), buffer, len(buffer), byref(length))
        return given.value, buffer.value.decode(errors="replace").split("\n") if length.value else []

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

    def process_region_set(self, region: int | None) -> None:
        """What threads outside of all regions allocate in; None: nothing."""
        self._call("sire_process_region_set", NO_REGION if region is None else region)

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

    def cancel(self) -> None:
        """Makes a running pause or resume stop and roll back."""
        self._call("sire_cancel")

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

    def _text(self, name: str, *arguments: Any) -> bytes:
        """A text output, as long as it has become by the time that it fits."""
        length = c_size_t(4096)
        while True:
            buffer = ctypes.create_string_buffer(length.value + 1)
            self._call(name, *arguments, buffer, length.value + 1, byref(length))
            if length.value < len(buffer):
                return buffer.value

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
        heard = _interface.ToldCallback() if told is None else _hearing(told, raised)
        self._call(name, *before, heard, None)
        if raised:
            raise raised[0]

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
        asked, heard = _Asked(dead_ranges), _hearing(told, raised)
        size = ctypes.sizeof(_interface.SafePointOptions)
        options = _interface.SafePointOptions(size, asked.function, None, heard, None, slice_seconds)
        held = c_bool()
        self._call("sire_safe_point", byref(options), byref(held))
        if asked.error is not None:
            raised.append(asked.error)
        if raised:
            raise raised[0]
        return held.value

    def safe_point_leave(self) -> None:
        """Nobody waits for the calling thread."""
        self._call("sire_safe_point_leave")

    def capture_begin(self) -> None:
        """A stream capture begins that no hook sees."""
        self._call("sire_capture_begin")

    def capture_end(self) -> None:
        """Ends one `capture_begin`."""
        self._call("sire_capture_end")


def _resume_options(wait_seconds: float, order: Ranges | None) -> _interface.ResumeOptions:
    ranges = (_interface.Range * len(order or ()))(*(_interface.Range(start, size) for start, size in order or ()))
    return _interface.ResumeOptions(ctypes.sizeof(_interface.ResumeOptions), wait_seconds, ranges, len(ranges))


Told = Callable[[int, "str | None"], bool]
"""Hears what happens to a tag (None: everything): 0 before a pause, which false refuses; 1 after a resume; 2 when
nothing was paused after all."""


def _hearing(told: Told, raised: list[BaseException]) -> Any:
    """The function for the library; what ``told`` raises is kept in ``raised``, and refuses."""

    def hear(_context: Any, what: int, tag: bytes | None) -> int:
        try:
            return 0 if told(what, None if tag is None else tag.decode()) else _CANCELLED
        except BaseException as error:
            raised.append(error)
            return _CANCELLED

    return _interface.ToldCallback(hear)


class _Asked:
    """A `DeadRanges` as C calls it; `error` is what it raised."""

    def __init__(self, answer: DeadRanges | None) -> None:
        self.error: BaseException | None = None
        self._answer = answer
        self._ranges: Any = None
        self.function = _interface.DeadRangesCallback() if answer is None else _interface.DeadRangesCallback(self._call)

    def _call(self, _context: Any, regions: Any, count: int, out_ranges: Any, out_count: Any) -> int:
        try:
            found = [] if self._answer is None else self._answer(regions[:count])
            # Kept until the pause returns.
            self._ranges = (_interface.Range * len(found))(*(_interface.Range(start, size) for start, size in found))
            out_ranges[0] = ctypes.cast(self._ranges, POINTER(_interface.Range))
            out_count[0] = len(found)
        except BaseException as error:
            self.error = error
            return _CANCELLED
        return 0


_CANCELLED = 9


def _fields(report: _interface.ReportStruct) -> dict[str, Any]:
    return {name: getattr(report, name) for name, *_ in _interface.ReportStruct._fields_ if name != "struct_size"}


# --- finding it ------------------------------------------------------------------------------------------

_ADVICE = (
    "Reinstall the package (pip install --force-reinstall ./python-shim), or name the library that belongs "
    "to it in SIRE_LIBRARY."
)

_loaded: Library | None = None
_loading = threading.Lock()


def load() -> Library:
    """The library of this process, loaded at the first call."""
    global _loaded
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _load()
        from .control import open_as_told

        open_as_told()
    return _loaded


def is_loaded() -> bool:
    """Whether `load` has succeeded."""
    return _loaded is not None


def library_path() -> Path:
    """The file that this package uses, without loading it."""
    named = os.environ.get("SIRE_LIBRARY")
    if named:
        path = Path(named)
        if not path.is_file():
            raise LibraryNotFoundError(f"SIRE_LIBRARY names {named}, which is not a file")
        return path.absolute()
    packaged = _PACKAGE / "_native" / LIBRARY_NAME
    if packaged.is_file():
        return packaged
    built = [path for path in _checkout_candidates() if path.is_file()]
    if built:
        return max(built, key=lambda path: path.stat().st_mtime)
    raise LibraryNotFoundError(
        f"{LIBRARY_NAME} is neither named in SIRE_LIBRARY nor in {packaged.parent}"
        f"{_checkout_note()}. Install the package with pip, or build the library with "
        "'cargo build --release' in the checkout."
    )


def driver_library_path() -> Path:
    """The library for driver-level hooks: beside the other one, as both are of one build."""
    path = library_path().with_name(DRIVER_LIBRARY_NAME)
    if not path.is_file():
        raise LibraryNotFoundError(
            f"driver-level hooks need {DRIVER_LIBRARY_NAME}, which is not at {path}. Reinstall the package, or build "
            "it with 'cargo build --release -p sire-driver-hooks' in the checkout."
        )
    return path


def mapped_copies(maps: str | None = None) -> list[str]:
    """The files named ``libsire_alloc.so`` that are mapped into this process."""
    if maps is None:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    paths: dict[str, None] = {}
    for line in maps.splitlines():
        columns = line.split(maxsplit=5)
        if len(columns) == 6 and _is_library_name(columns[5]):
            paths[columns[5]] = None
    return list(paths)


_DELETED = " (deleted)"


def _is_library_name(path: str) -> bool:
    return path.removesuffix(_DELETED).rpartition("/")[2] == LIBRARY_NAME


def _load() -> Library:
    mapped = mapped_copies()
    if not mapped:
        return _checked(library_path())
    if len(mapped) > 1:
        raise VersionMismatchError(
            f"this process has loaded several copies of the library ({', '.join(mapped)}), each of which "
            "knows only its own allocations. Preload and load the same file: $(sire path)."
        )
    [present] = mapped
    if present.endswith(_DELETED):
        raise VersionMismatchError(
            f"the library that this process loaded, {present.removesuffix(_DELETED)}, was replaced or removed "
            "since. Restart the process."
        )
    try:
        wanted: Path | None = library_path()
    except LibraryNotFoundError:
        wanted = None
    if wanted is not None and not _same_content(wanted, Path(present)):
        raise VersionMismatchError(
            f"this process has loaded {present} (by LD_PRELOAD or otherwise), but the package uses {wanted}, "
            "which is another build. Preload the package's own: LD_PRELOAD=$(sire path)."
        )
    return _checked(Path(present))


def _checked(path: Path) -> Library:
    library = Library(str(path))
    library.check(_recorded_build_id())
    return library


def _recorded_build_id() -> str | None:
    """The build that the installed package was made with; None in a checkout."""
    try:
        return (_PACKAGE / "_native" / "build_id.txt").read_text().strip()
    except OSError:
        return None


def _same_content(one: Path, other: Path) -> bool:
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)


def _checkout() -> Path | None:
    """The repository that this package lies in, if it is used from there."""
    root = _PACKAGE.parents[2]
    return root if (root / "cdylib").is_dir() and (root / "Cargo.toml").is_file() else None


def _checkout_candidates() -> list[Path]:
    root = _checkout()
    if root is None:
        return []
    return [root / "target" / kind / LIBRARY_NAME for kind in ("release", "debug")]


def _checkout_note() -> str:
    root = _checkout()
    return f" nor in {root / 'target'}" if root else ""
