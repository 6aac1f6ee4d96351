"""GPU memory that a program can put down and pick up again.

    import torch, sire

    with sire.region("weights", backup="cpu"):
        model = Model().cuda()

    sire.pause("weights")    # physical memory is free for others; addresses stay
    sire.resume("weights")   # same addresses, same bytes

PyTorch is used if the program imports it; importing this package imports nothing heavy. `hook_mode` says how
allocations reach Sire and can be assigned before the first use: ``sire.hook_mode = "torch"``.
"""

from __future__ import annotations

import os as _os
import sys as _sys
import types as _types
from typing import Any as _Any

from . import _hooks
from ._allocator import (
    Allocator,
    empty_cache,
    memory_snapshot,
    memory_stats,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
    use_allocator,
)
from ._callbacks import Callback, after_resume, before_pause
from ._check import checked
from ._errors import (
    BackupIoError,
    BusyError,
    CancelledError,
    CapturingError,
    DeviceLostError,
    DriverError,
    InactiveError,
    InternalError,
    InvalidArgumentError,
    LibraryNotFoundError,
    NoDriverError,
    OutOfBackupSpaceError,
    OutOfMemoryError,
    PausedAfterFailureError,
    PausedError,
    ProbeError,
    ProbeTimeoutError,
    RankError,
    ReservationTimeoutError,
    SireError,
    UnknownAddressError,
    UnknownTagError,
    UnsupportedError,
    VersionMismatchError,
)
from ._files import FileBackup, file_backup
from ._graphs import cuda_graph
from ._library import library_path
from ._memory import (
    Trimmed,
    changed,
    discard,
    get_cpu_backup,
    held,
    keep,
    keep_resident,
    set_disk_directory,
    set_margin,
    stats,
    trim,
)
from ._process import configure_subprocess, subprocess_environment
from ._progress import Order, Progress, learn_order
from ._reclaimable import Reclaimable, reclaimable, wait_for_memory
from ._regions import Region, disable, region
from ._report import Report
from ._sizes import format_size, parse_size
from ._time_slices import TimeSlice, time_slice
from ._transitions import pause, paused, pre_copy, prefetch, promote, resume, switch
from ._version import __version__
from .control import safe_point

version = __version__

__all__ = [
    "Allocator",
    "BackupIoError",
    "BusyError",
    "Callback",
    "CancelledError",
    "CapturingError",
    "DeviceLostError",
    "DriverError",
    "FileBackup",
    "InactiveError",
    "InternalError",
    "InvalidArgumentError",
    "LibraryNotFoundError",
    "NoDriverError",
    "Order",
    "OutOfBackupSpaceError",
    "OutOfMemoryError",
    "PausedAfterFailureError",
    "PausedError",
    "ProbeError",
    "ProbeTimeoutError",
    "Progress",
    "RankError",
    "Reclaimable",
    "Region",
    "Report",
    "ReservationTimeoutError",
    "SireError",
    "TimeSlice",
    "Trimmed",
    "UnknownAddressError",
    "UnknownTagError",
    "UnsupportedError",
    "VersionMismatchError",
    "__version__",
    "after_resume",
    "before_pause",
    "changed",
    "checked",
    "configure_subprocess",
    "cuda_graph",
    "disable",
    "discard",
    "empty_cache",
    "file_backup",
    "format_size",
    "get_cpu_backup",
    "held",
    "hook_mode",
    "keep",
    "keep_resident",
    "learn_order",
    "library_path",
    "memory_snapshot",
    "memory_stats",
    "parse_size",
    "pause",
    "paused",
    "pre_copy",
    "prefetch",
    "promote",
    "reclaimable",
    "region",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
    "resume",
    "safe_point",
    "set_disk_directory",
    "set_margin",
    "stats",
    "subprocess_environment",
    "switch",
    "time_slice",
    "trim",
    "use_allocator",
    "version",
    "wait_for_memory",
]

_MODELS = frozenset(
    (
        "AutoManageHook",
        "AutoManageWrapper",
        "BaseResourcePoolUser",
        "DiffusersPipelineWrapper",
        "LearnedEstimator",
        "Prefetch",
        "Profiler",
        "ResourcePool",
        "ResourcePoolCPU",
        "ResourcePoolCUDA",
        "ResourcePoolDisk",
        "ResourcePoolManagement",
        "ResourcePoolUserABC",
        "TorchModuleWrapper",
        "TransformersModelWrapper",
        "WeakRefResourcePoolUser",
        "adopt",
        "auto_manage",
        "events",
        "evict",
        "get_resource_management",
        "get_sire_inference_context",
        "initialize",
        "learned_estimator",
        "manage",
        "pin",
        "setup_default_pools",
        "sire_inference_context_manager",
        "summary",
        "unpin",
    )
)
"""Names of `sire.models`, which is imported when one of them is used."""
_COMMITS = frozenset(
    (
        "AutoManageCommitObjectProxy",
        "CallableCommit",
        "CommitABC",
        "CommitObjectProxy",
        "CommitWithAutoManage",
        "HookCommit",
        "InferenceOptimizerCommit",
        "InferenceOptimizerHook",
        "LoraCommit",
        "WeightCommit",
    )
)
"""Names of `sire.models.commits`, likewise."""
_SUBPACKAGES = frozenset(("compat", "control", "distributed", "memory", "models", "slyce", "torchtools", "vllm"))


def __getattr__(name: str) -> _Any:
    import importlib

    if name in _MODELS:
        return getattr(importlib.import_module(".models", __name__), name)
    if name in _COMMITS:
        return getattr(importlib.import_module(".models.commits", __name__), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODELS, *_COMMITS, *_SUBPACKAGES})


hook_mode: _hooks.HookMode | None
"""``"preload"``, ``"driver"``, ``"torch"`` or ``"allocator"``; None while it is neither set nor needed yet."""


class _Module(_types.ModuleType):
    """The module, with `hook_mode` as an attribute that checks what is assigned."""

    @property
    def hook_mode(self) -> _hooks.HookMode | None:
        return _hooks.known_hook_mode()

    @hook_mode.setter
    def hook_mode(self, mode: _Any) -> None:
        _hooks.set_hook_mode(mode)


_sys.modules[__name__].__class__ = _Module

if "SIRE_TIME_SLICE" in _os.environ:
    from ._time_slices import enter_as_told as _enter_as_told

    _enter_as_told()
