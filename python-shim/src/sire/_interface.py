"""The C interface as ctypes knows it: the structs, and the arguments of every function, as in ``include/sire.h``.

Only declarations: what calls them is `_calls`. Functions return a status unless `_calls.loaded` says otherwise.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_double, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any


class RegionOptions(ctypes.Structure):
    """``sire_region_options``."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("backup", c_int32),
        ("zero_fill", c_bool),
        ("retain", c_bool),
        ("clean", c_int32),
        ("pageable", c_bool),
        ("whole", c_bool),
    ]


class Range(ctypes.Structure):
    _fields_ = [("start", c_void_p), ("bytes", c_size_t)]


DeadRangesCallback = ctypes.CFUNCTYPE(
    c_int32, c_void_p, POINTER(c_uint32), c_size_t, POINTER(POINTER(Range)), POINTER(c_size_t)
)


class PauseOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dead_ranges", DeadRangesCallback),
        ("dead_ranges_context", c_void_p),
        ("release", c_int32),
        ("idle", c_uint64),
        ("alone", c_uint64),
    ]


ToldCallback = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int32, c_char_p)


class SafePointOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dead_ranges", DeadRangesCallback),
        ("dead_ranges_context", c_void_p),
        ("told", ToldCallback),
        ("told_context", c_void_p),
        ("slice_seconds", c_double),
    ]


class ResumeOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("wait_seconds", c_double),
        ("order", POINTER(Range)),
        ("order_count", c_size_t),
        ("alone", c_uint64),
    ]


class ReportStruct(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("regions_changed", c_uint32),
        ("regions_unchanged", c_uint32),
        *(
            (name, c_uint64)
            for name in (
                "allocations",
                "bytes_expected",
                "bytes_moved",
                "bytes_copied",
                "bytes_discarded",
                "bytes_zeroed",
            )
        ),
        *((name, c_double) for name in ("seconds_prepare", "seconds_synchronize", "seconds_transfer", "seconds_total")),
        *(
            (name, c_uint64)
            for name in (
                "bytes_dead",
                "bytes_clean",
                "bytes_hashed",
                "bytes_constant",
                "bytes_shared",
                "bytes_recycled",
                "bytes_lazy",
                "bytes_held",
            )
        ),
    ]


class Standing(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("priority", c_int32), ("pinned", c_bool), ("keep_alive_seconds", c_double)]


class Budget(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("limit_bytes", c_uint64),
        ("headroom_bytes", c_uint64),
        ("residency_seconds", c_double),
    ]


class ReserveOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("bytes", c_uint64),
        ("margin_bytes", c_uint64),
        ("timeout_seconds", c_double),
        ("fence", c_int32),
        ("directory", c_char_p),
        ("preempt", c_int32),
        ("priority", c_int32),
    ]


class ReclaimableOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("priority", c_int32),
        ("stay_away", c_int32),
        ("go_on", c_int32),
        ("discard", c_int32),
        ("after_idle_seconds", c_double),
    ]


class ReservationReport(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("reserved_bytes", c_uint64),
        ("fenced_bytes", c_uint64),
        ("unused_bytes", c_uint64),
    ]


class TimeSliceOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("quantum_seconds", c_double),
        ("timeout_seconds", c_double),
        ("group", c_char_p),
        ("directory", c_char_p),
    ]


SIGNATURES: dict[str, list[Any]] = {
    "sire_region_open": [c_char_p, POINTER(RegionOptions), POINTER(c_uint32)],
    "sire_region_enter_on": [c_uint32, c_int32, c_int32],
    "sire_region_leave": [c_uint32],
    "sire_region_current": [POINTER(c_uint32)],
    "sire_region_suspend": [],
    "sire_region_unsuspend": [],
    "sire_process_region_set": [c_uint32],
    "sire_region_state": [c_uint32, POINTER(c_int32)],
    "sire_allocate": [c_size_t, c_int32, c_void_p, POINTER(c_void_p)],
    "sire_free": [c_void_p],
    "sire_allocation": [
        c_void_p,
        POINTER(c_void_p),
        POINTER(c_size_t),
        POINTER(c_int32),
        POINTER(c_uint32),
    ],
    "sire_keep": [c_void_p, c_size_t],
    "sire_discard": [c_void_p, c_size_t],
    "sire_changed": [c_void_p, c_size_t],
    "sire_attach_file": [c_void_p, c_size_t, c_char_p, c_uint64],
    "sire_require_usable": [c_void_p],
    "sire_keep_resident": [c_void_p, POINTER(c_size_t)],
    "sire_backup_get": [c_void_p, c_size_t, POINTER(c_void_p), POINTER(c_void_p)],
    "sire_backup_put": [c_void_p],
    "sire_pause": [c_char_p, POINTER(PauseOptions), POINTER(ReportStruct)],
    "sire_pre_copy": [c_char_p, POINTER(ReportStruct)],
    "sire_resume": [c_char_p, POINTER(ResumeOptions), POINTER(ReportStruct)],
    "sire_switch": [c_char_p, c_char_p, POINTER(PauseOptions), POINTER(ReportStruct), POINTER(ReportStruct)],
    "sire_resume_start": [c_char_p, POINTER(ResumeOptions), POINTER(c_void_p)],
    "sire_progress_ready": [c_void_p, c_void_p, c_size_t, POINTER(c_bool)],
    "sire_progress_wait": [c_void_p, c_void_p, c_size_t, c_double, POINTER(c_bool)],
    "sire_progress_wait_stream": [c_void_p, c_void_p, c_size_t, c_int32, c_void_p, c_double, POINTER(c_bool)],
    "sire_progress_report": [c_void_p, POINTER(ReportStruct)],
    "sire_progress_bytes": [c_void_p, POINTER(c_uint64), POINTER(c_uint64)],
    "sire_progress_cancel": [c_void_p],
    "sire_progress_close": [c_void_p],
    "sire_promote": [c_char_p, POINTER(c_size_t)],
    "sire_cancel": [],
    "sire_standing_set": [c_char_p, POINTER(Standing)],
    "sire_lease": [c_char_p],
    "sire_unlease": [c_char_p],
    "sire_budget_set": [c_int32, POINTER(Budget)],
    "sire_budget_get": [c_int32, POINTER(Budget)],
    "sire_make_room": [c_int32, c_size_t, POINTER(c_size_t), c_char_p, c_size_t, POINTER(c_size_t)],
    "sire_reserve": [c_int32, POINTER(ReserveOptions), POINTER(c_void_p)],
    "sire_reservation_resize": [c_void_p, c_uint64, c_double, c_int32],
    "sire_reservation_note_owned": [c_void_p, c_uint64],
    "sire_reservation_get": [c_void_p, POINTER(ReservationReport)],
    "sire_reservation_release": [c_void_p],
    "sire_reservations_json": [c_int32, c_char_p, c_char_p, c_size_t, POINTER(c_size_t)],
    "sire_reclaimable_open": [c_char_p, POINTER(ReclaimableOptions), POINTER(c_uint64)],
    "sire_reclaimable_used": [c_uint64, c_double],
    "sire_reclaimable_close": [c_uint64, ToldCallback, c_void_p],
    "sire_reclaimable_json": [c_char_p, c_size_t, POINTER(c_size_t)],
    "sire_time_slice_open": [c_int32, POINTER(TimeSliceOptions)],
    "sire_time_slice_close": [],
    "sire_time_slice_json": [c_char_p, c_size_t, POINTER(c_size_t)],
    "sire_allow_peer": [c_int32, c_int32],
    "sire_set_margin": [c_size_t],
    "sire_set_disk_directory": [c_char_p],
    "sire_memory_stats_json": [c_int32, c_char_p, c_size_t, POINTER(c_size_t)],
    "sire_memory_snapshot_json": [c_char_p, c_size_t, POINTER(c_size_t)],
    "sire_memory_stats_reset": [c_int32, c_bool],
    "sire_empty_cache": [POINTER(c_size_t)],
    "sire_trim": [POINTER(c_size_t), POINTER(c_size_t)],
    "sire_hook_probe": [POINTER(c_int32)],
    "sire_driver_hook_probe": [POINTER(c_int32)],
    "sire_stats_json": [c_char_p, c_size_t, POINTER(c_size_t)],
    "sire_control_open": [c_char_p, c_size_t, POINTER(c_size_t)],
    "sire_control_close": [ToldCallback, c_void_p],
    "sire_control_give_up": [ToldCallback, c_void_p],
    "sire_control_wait": [c_double, POINTER(c_bool)],
    "sire_control_publish": [c_char_p],
    "sire_safe_point": [POINTER(SafePointOptions), POINTER(c_bool)],
    "sire_safe_point_leave": [],
    "sire_capture_begin": [],
    "sire_capture_end": [],
}
