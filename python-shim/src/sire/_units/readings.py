"""How full GPU, host memory and disk are now. Reads; moves nothing.

The GPU's numbers are the driver's, so that other processes count; what PyTorch's cache holds free counts as free. Host
memory is the machine's or the control group's, whichever has less left.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _torch

_log = logging.getLogger("sire.memory")

# PyTorch takes memory in pieces of 20 MiB: less left free than that is none for it.
_LEAST_HEADROOM = 24 << 20


@dataclass(frozen=True)
class Usage:
    """Of one place, bytes: all, and those that are free."""

    total: int
    free: int

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self.total - self.free

    @property
    def usage_ratio(self) -> float:
        """Share in use; 0 where there is nothing."""
        return self.used / self.total if self.total else 0.0

    def summary(self) -> dict[str, Any]:
        """As a table."""
        return {
            "total_bytes": self.total,
            "used_bytes": self.used,
            "free_bytes": self.free,
            "usage_ratio": self.usage_ratio,
        }


def read_gpus() -> dict[int, Usage]:
    """All GPUs that this process uses, but for those that cannot be read now, which are logged; none where CUDA was not
    initialised. The others are left alone: who reads one has a context there, of hundreds of MB.
    """
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    current, found = torch.cuda.current_device(), {}
    for index in range(torch.cuda.device_count()):
        if index == current or torch._C._cuda_hasPrimaryContext(index):
            try:
                found[index] = read_gpu(index)
            except RuntimeError as error:
                _log.warning("cuda:%d cannot be read: %s", index, error)
    return found


def read_gpu(index: int) -> Usage:
    """One GPU: what the driver calls free, and what PyTorch's cache could give."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return Usage(int(total), min(int(total), int(free) + _torch.free_in_cache(torch, index)))


def read_cpu() -> Usage:
    """Host memory: the machine's, or the control group's if that has less left."""
    machine = _read_machine()
    group = _read_group()
    return group if group is not None and group.free < machine.free else machine


def _read_machine() -> Usage:
    numbers: dict[str, int] = {}
    with Path("/proc/meminfo").open() as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                numbers[name] = int(rest.split()[0]) * 1024
    return Usage(numbers.get("MemTotal", 0), numbers.get("MemAvailable", 0))


_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def _read_group() -> Usage | None:
    for limit_path, used_path, stat_path in _GROUPS:
        try:
            limit = Path(limit_path).read_text().strip()
            if limit == "max" or int(limit) >= 1 << 60:
                return None
            used, stat = int(Path(used_path).read_text()), Path(stat_path).read_text()
        except (OSError, ValueError):
            continue
        cache = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
        return Usage(int(limit), max(0, int(limit) - max(0, used - cache)))
    return None


def read_disk(directory: Path) -> Usage:
    """The file system of the directory, or of the nearest one above it that exists."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    found = shutil.disk_usage(directory)
    return Usage(found.total, found.free)


def below(device: Any, fill: float) -> int:
    """Bytes of a GPU that are free below a share of it; negative if more is used."""
    usage = read_gpu(device.index)
    headroom = min(_LEAST_HEADROOM, usage.total // 2)
    return min(int(usage.total * fill), usage.total - headroom) - usage.used
