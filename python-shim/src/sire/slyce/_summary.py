"""Where the slices of a model are, as numbers and as a table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .._units.readings import read_gpu

if TYPE_CHECKING:
    from ._manager import Slice, SliceManager


@dataclass(frozen=True)
class SliceState:
    """One slice. ``tier``: ``gpu``, ``cpu``, ``disk``, or ``not made``."""

    name: str
    tier: str
    device: str
    parameters: int
    gpu_bytes: int
    cpu_bytes: int
    disk_bytes: int
    """Bytes that the file stands for."""
    uses: int
    active: bool
    pinned: bool


@dataclass(frozen=True)
class SlyceSummary:
    """A model's slices, and the bytes of all of them. ``str`` gives a table."""

    strategy: str
    slices: tuple[SliceState, ...]
    gpu_limit_bytes: int | None
    gpu_used_bytes: int
    """Of the device, whoever uses them."""
    process_bytes: int
    """Host memory of this process."""
    loads: int
    offloads: int
    prefetches: int

    @property
    def gpu_bytes(self) -> int:
        """Bytes of slices on the GPU."""
        return sum(each.gpu_bytes for each in self.slices)

    @property
    def cpu_bytes(self) -> int:
        """Bytes of slices in host memory."""
        return sum(each.cpu_bytes for each in self.slices)

    @property
    def disk_bytes(self) -> int:
        """Bytes of slices on the disk."""
        return sum(each.disk_bytes for each in self.slices)

    def __str__(self) -> str:
        lines = [
            f"{'slice':<24} {'where':<9} {'parameters':>12} {'GPU MiB':>9} {'CPU MiB':>9} {'disk MiB':>9} {'uses':>6}"
        ]
        for each in self.slices:
            mark = "*" if each.active else " "
            lines.append(
                f"{mark}{each.name:<23} {each.tier:<9} {each.parameters:>12} {each.gpu_bytes / 2**20:>9.1f} "
                f"{each.cpu_bytes / 2**20:>9.1f} {each.disk_bytes / 2**20:>9.1f} {each.uses:>6}"
            )
        limit = "" if self.gpu_limit_bytes is None else f" of {self.gpu_limit_bytes / 2**20:.1f}"
        lines.append(
            f"strategy {self.strategy}: GPU {self.gpu_bytes / 2**20:.1f}{limit} MiB, CPU {self.cpu_bytes / 2**20:.1f} "
            f"MiB, disk {self.disk_bytes / 2**20:.1f} MiB; {self.loads} loads, {self.offloads} offloads"
        )
        return "\n".join(lines)


def summarize(manager: SliceManager, active: str) -> SlyceSummary:
    """How it stands now."""
    device = manager.device
    return SlyceSummary(
        strategy=manager.strategy,
        slices=tuple(_state(each, each.name == active) for each in manager.slices.values()),
        gpu_limit_bytes=manager.budget,
        gpu_used_bytes=read_gpu(device.index).used if device.type == "cuda" else 0,
        process_bytes=_process_bytes(),
        loads=manager.counts["loads"],
        offloads=manager.counts["offloads"],
        prefetches=manager.counts["prefetches"],
    )


def _state(found: Slice, active: bool) -> SliceState:
    unit = found.unit
    if unit is None:
        return SliceState(found.name, "not made", "", 0, 0, 0, 0, 0, active, False)
    tier = unit.tier
    count = sum(each.numel() for each in found.module.parameters())
    gpu, cpu, disk = ((unit.nbytes if tier == place else 0) for place in ("gpu", "cpu", "disk"))
    return SliceState(found.name, tier, str(unit.device), count, gpu, cpu, disk, unit.uses, active, unit.pinned)


def _process_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
