"""What a pause or resume did, as the library counted it."""

from __future__ import annotations

from dataclasses import dataclass

from ._sizes import format_size


@dataclass(frozen=True)
class Report:
    """The result of one pause or resume. Bytes are device bytes, times are wall-clock seconds."""

    action: str
    """``"pause"``, ``"resume"`` or ``"pre_copy"``."""
    tag: str | None
    """The tag that was asked for; None for everything."""
    regions_changed: int = 0
    """Regions whose state the call changed; of a pre-copy, those that it looked at."""
    regions_unchanged: int = 0
    """Regions that were already in the wanted state."""
    allocations: int = 0
    """Allocations in the changed regions."""
    bytes_expected: int = 0
    """Physical bytes that the changed regions hold when resident."""
    bytes_moved: int = 0
    """Physical bytes given back to (pause) or taken from (resume) the driver."""
    bytes_copied: int = 0
    """Bytes copied to or from backups."""
    bytes_discarded: int = 0
    """Bytes whose content was thrown away (pause)."""
    bytes_zeroed: int = 0
    """Bytes filled with zeros (resume)."""
    seconds_prepare: float = 0.0
    """Finding, checking, reserving room for backups."""
    seconds_synchronize: float = 0.0
    """Waiting for the devices."""
    seconds_transfer: float = 0.0
    """Copies and virtual-memory calls."""
    seconds_total: float = 0.0
    """The whole call."""
    bytes_dead: int = 0
    """Bytes that PyTorch's cache holds free: neither copied nor counted as discarded (pause)."""
    bytes_clean: int = 0
    """Bytes that an earlier pause or pre-copy had backed up and that had not changed: nothing was copied."""
    bytes_hashed: int = 0
    """Bytes that were hashed or compared to find out (pause)."""
    bytes_constant: int = 0
    """Bytes that repeat one 8-byte pattern and need no room in a backup (pause)."""
    bytes_shared: int = 0
    """Bytes that another backup of this process has already, and that share its room (pause)."""
    bytes_recycled: int = 0
    """Physical bytes that changed hands within a switch, without the driver."""
    bytes_lazy: int = 0
    """Physical bytes that stay until somebody needs them (lazy pause)."""
    bytes_held: int = 0
    """Physical bytes that stay because they were handed out or are kept resident; `sire.held` says why (pause)."""
    notes: tuple[str, ...] = ()
    """What was left undone, though nothing failed, and why."""

    @property
    def changed(self) -> bool:
        """Whether any region changed its state."""
        return self.regions_changed > 0

    @property
    def empty(self) -> bool:
        """Whether the regions that changed hold no allocation, so that no byte moved."""
        return self.allocations == 0

    def __str__(self) -> str:
        what = "everything" if self.tag is None else f"tag {self.tag!r}"
        if not self.changed:
            return f"{self.action} of {what}: already so, nothing to do"
        if self.empty and self.bytes_held:
            return f"{self.action} of {what}: nothing moved, {format_size(self.bytes_held)} held on the device"
        if self.empty:
            return f"{self.action} of {what}: no memory was allocated there, nothing moved"
        if self.action == "pre_copy":
            return f"{self._copied_ahead(what)}, {self.seconds_total * 1000:.1f} ms"
        verb = "released" if self.action == "pause" else "taken back"
        text = (
            f"{self.action} of {what}: {format_size(self.bytes_moved)} of "
            f"{format_size(self.bytes_expected)} {verb} in {self.allocations} allocations, "
            f"{format_size(self.bytes_copied)} copied"
        )
        if self.bytes_discarded:
            text += f", {format_size(self.bytes_discarded)} discarded"
        if self.bytes_zeroed:
            text += f", {format_size(self.bytes_zeroed)} zeroed"
        if self.bytes_clean:
            text += f", {format_size(self.bytes_clean)} unchanged"
        if self.bytes_lazy:
            text += f", {format_size(self.bytes_lazy)} kept until needed"
        if self.bytes_held:
            text += f", {format_size(self.bytes_held)} held on the device"
        if self.bytes_dead:
            text += f", {format_size(self.bytes_dead)} free in PyTorch's cache"
        return f"{text}, {self.seconds_total * 1000:.1f} ms"

    def _copied_ahead(self, what: str) -> str:
        return (
            f"pre_copy of {what}: {format_size(self.bytes_copied)} of {format_size(self.bytes_expected)} copied in "
            f"{self.allocations} allocations, {format_size(self.bytes_clean)} unchanged"
        )
