"""What `sire.memory` is to do, checked: thresholds, tiers, and when things happen."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .._errors import InvalidArgumentError


@dataclass
class MemoryConfig:
    """Settings of a `MemoryManager`. Ratios are shares of a whole, between 0 and 1; times are seconds.

    Raises `InvalidArgumentError`, which is a `ValueError`, for a value that makes no sense: it names the field.
    """

    gpu_offload_threshold: float = 0.85
    """GPU usage at which units begin to leave."""
    gpu_emergency_threshold: float = 0.95
    """GPU usage at which everything that is not in use leaves; nothing is brought beyond it while anything can go."""
    gpu_reload_threshold: float = 0.70
    """GPU usage up to which units are brought before they are needed; above it only as many bytes come as leave for
    them.
    """
    cpu_offload_threshold: float = 0.90
    """Host memory usage at which units move from host memory to the disk."""
    memory_check_interval: float = 0.1
    """Seconds between two looks at memory."""
    enable_cpu_offload: bool = True
    """Units that leave the GPU go to host memory; otherwise straight to the disk."""
    enable_disk_offload: bool = True
    """Units may go to the disk."""
    compress_disk_cache: bool = True
    """Files on the disk are compressed without loss, where that makes them smaller."""
    eager_offload_on_wrap: bool = True
    """What is wrapped leaves the GPU at once, and `.to(device)` moves nothing of it."""
    offload_1d_parameters: bool = False
    """Tensors of one dimension (biases, norms) leave too; otherwise they stay where `.to` puts them."""
    max_disk_usage_gb: float = 50.0
    """GiB on the disk at most."""
    offload_batch_size: int = 10
    """Units that leave at most at one look at memory, but for an emergency."""
    prefetch_enabled: bool = True
    """Units are brought in the order in which they were used before."""
    cpu_emergency_threshold: float = 0.98
    """Host memory usage at which everything that is not in use goes to the disk."""
    prediction_window: int = 5
    """Looks at memory from which its trend is judged."""
    disk_cache_dir: str | os.PathLike[str] | None = None
    """Where files are kept; None: the system's temporary directory."""
    pin_memory: bool = True
    """Host memory is registered with the driver, for faster copies."""
    vram_cap_gb: float | None = None
    """GiB that the units may take on one GPU; None: as far as the thresholds go."""
    aggressive_post_forward_offload: bool = False
    """A unit leaves the GPU as soon as its forward is over."""
    empty_cache_after_offload: bool = True
    """PyTorch's cache is emptied when units left because of a threshold, so that others get the memory."""
    min_free_gpu_memory: float = 0.1
    """Share of the GPU that loading leaves free for activations, while anything can go."""
    time_since_forward_threshold: float = 2.0
    """Seconds without a forward after which a unit leaves before those that were used since."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Checks every field, and what they mean together."""
        for each in fields(self):
            _CHECKS[each.name](each.name, getattr(self, each.name))
        _ascending(self, "gpu_reload_threshold", "gpu_offload_threshold", "gpu_emergency_threshold")
        _ascending(self, "cpu_offload_threshold", "cpu_emergency_threshold")

    @classmethod
    def for_low_memory(cls) -> MemoryConfig:
        """Leaves the GPU early, keeps little on the disk."""
        return cls(
            gpu_offload_threshold=0.70,
            gpu_emergency_threshold=0.85,
            gpu_reload_threshold=0.50,
            cpu_offload_threshold=0.80,
            offload_batch_size=20,
            max_disk_usage_gb=20.0,
        )

    @classmethod
    def for_high_performance(cls) -> MemoryConfig:
        """Fills the GPU, looks often."""
        return cls(
            gpu_offload_threshold=0.95,
            gpu_emergency_threshold=0.98,
            gpu_reload_threshold=0.85,
            cpu_offload_threshold=0.95,
            memory_check_interval=0.05,
            offload_batch_size=5,
            min_free_gpu_memory=0.02,
        )


Check = Callable[[str, Any], None]


def _ratio(name: str, value: Any) -> None:
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise InvalidArgumentError(f"{name} is a share between 0 and 1, not {value!r}")


def _positive(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise InvalidArgumentError(f"{name} is a number above 0, not {value!r}")


def _not_negative(name: str, value: Any) -> None:
    if not _is_number(value) or value < 0:
        raise InvalidArgumentError(f"{name} is a number, 0 or more, not {value!r}")


def _count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgumentError(f"{name} is a whole number, 1 or more, not {value!r}")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} is True or False, not {value!r}")


def _path(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise InvalidArgumentError(f"{name} is a path or None, not {value!r}")


def _perhaps_positive(name: str, value: Any) -> None:
    if value is not None:
        _positive(name, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_CHECKS: dict[str, Check] = {
    "gpu_offload_threshold": _ratio,
    "gpu_emergency_threshold": _ratio,
    "gpu_reload_threshold": _ratio,
    "cpu_offload_threshold": _ratio,
    "memory_check_interval": _positive,
    "enable_cpu_offload": _flag,
    "enable_disk_offload": _flag,
    "compress_disk_cache": _flag,
    "eager_offload_on_wrap": _flag,
    "offload_1d_parameters": _flag,
    "max_disk_usage_gb": _not_negative,
    "offload_batch_size": _count,
    "prefetch_enabled": _flag,
    "cpu_emergency_threshold": _ratio,
    "prediction_window": _count,
    "disk_cache_dir": _path,
    "pin_memory": _flag,
    "vram_cap_gb": _perhaps_positive,
    "aggressive_post_forward_offload": _flag,
    "empty_cache_after_offload": _flag,
    "min_free_gpu_memory": _ratio,
    "time_since_forward_threshold": _not_negative,
}


def _ascending(config: MemoryConfig, *names: str) -> None:
    for lower, upper in itertools.pairwise(names):
        if getattr(config, lower) > getattr(config, upper):
            raise InvalidArgumentError(
                f"{lower} ({getattr(config, lower)}) must not be above {upper} ({getattr(config, upper)}); set both"
            )
