"""How a unit leaves the GPU, and how it comes back: strategies that `MemoryManager` takes, and that users can write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .._units.disk import DiskStore

if TYPE_CHECKING:
    from .._units.residency import Residency
    from .._units.unit import Unit


class OffloadStrategy(ABC):
    """Where units go. Methods are called with nobody using the unit; they return whether it moved."""

    @abstractmethod
    def offload(self, unit: Unit, residency: Residency) -> bool:
        """Sends a unit one tier down, or further."""

    def reload(self, unit: Unit, residency: Residency) -> bool:
        """Brings a unit to where it is to be used."""
        with residency.lease(unit):
            return unit.ready

    def cleanup_all(self) -> None:  # noqa: B027 - most keep nothing
        """Drops whatever the strategy keeps of its own; units have left it by then."""


class CPUOffloadStrategy(OffloadStrategy):
    """From the GPU to host memory."""

    def offload(self, unit: Unit, residency: Residency) -> bool:
        """Sends a unit to host memory."""
        return residency.evict(unit)


class DiskOffloadStrategy(OffloadStrategy):
    """To the disk, from wherever it is."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store

    def offload(self, unit: Unit, residency: Residency) -> bool:
        """Sends a unit to the disk; where that is full it stays in host memory."""
        return residency.demote(unit)

    def cleanup_all(self) -> None:
        """Removes the files."""
        self._store.close()

    def get_cache_info(self) -> dict[str, Any]:
        """Files, bytes on the disk and the bytes they stand for, the limit and the directory."""
        return self._store.info()


class SmartOffloadStrategy(OffloadStrategy):
    """To host memory, and from there to the disk when host memory is short; straight to the disk without the former."""

    def __init__(self, cpu: CPUOffloadStrategy | None, disk: DiskOffloadStrategy | None) -> None:
        self.cpu = cpu
        self.disk = disk

    def offload(self, unit: Unit, residency: Residency) -> bool:
        """Sends a unit one tier down."""
        if unit.tier == "gpu" and self.cpu is not None:
            return self.cpu.offload(unit, residency)
        return self.disk is not None and self.disk.offload(unit, residency)

    def cleanup_all(self) -> None:
        """Removes the files."""
        if self.disk is not None:
            self.disk.cleanup_all()
