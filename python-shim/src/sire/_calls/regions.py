"""Regions, and the memory in them: `cdylib/abi/region.rs` and `memory.rs`."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass

from .. import _interface
from .._errors import UnknownAddressError
from .loaded import Loaded

NO_REGION = 0xFFFFFFFF


@dataclass(frozen=True)
class Allocation:
    """What the library knows about the allocation that holds an address."""

    base: int
    size: int
    device: int
    region: int


class Regions(Loaded):
    """Opening, entering and leaving; allocating and freeing; what is said about ranges."""

    def region_open(
        self,
        tag: bytes,
        backup: int,
        zero_fill: bool,
        retain: bool,
        clean: int = 0,
        pageable: bool = False,
        whole: bool = False,
    ) -> int:
        """The region of this tag and policy, made if there is none."""
        options = _interface.RegionOptions(
            ctypes.sizeof(_interface.RegionOptions), backup, zero_fill, retain, clean, pageable, whole
        )
        region = c_uint32()
        self._call("sire_region_open", tag, byref(options), byref(region))
        return region.value

    def region_enter(self, region: int, device: int | None, resume_if_paused: bool) -> None:
        """The calling thread goes inside, for what it allocates on a device; None: on every one."""
        self._call("sire_region_enter_on", region, -1 if device is None else device, int(resume_if_paused))

    def region_leave(self, region: int) -> None:
        """The calling thread leaves its innermost region."""
        self._call("sire_region_leave", region)

    def region_current(self) -> int | None:
        """The region in which the calling thread allocates."""
        region = c_uint32()
        self._call("sire_region_current", byref(region))
        return None if region.value == NO_REGION else region.value

    def allow_peer(self, device: int, peer: int) -> None:
        """``peer`` may read and write memory of regions on ``device``."""
        self._call("sire_allow_peer", device, peer)

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

    def process_region_set(self, region: int | None) -> None:
        """What threads outside of all regions allocate in; None: nothing."""
        self._call("sire_process_region_set", NO_REGION if region is None else region)

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
