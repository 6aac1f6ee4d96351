"""Memory that the tensors of a module are packed into: one allocation of the library's on the device, and host memory.

Both hand out pieces as plain byte tensors, and live as long as any tensor over them does: PyTorch's storages hold the
pieces, the pieces hold the memory. Nothing here knows modules.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from . import _library, _torch
from ._errors import OutOfBackupSpaceError

ALIGNMENT = 512
"""Bytes: where a tensor may begin, on the device and in host memory, as PyTorch's own allocator has it."""
# Registering less than this with the driver costs more than it saves.
_WORTH_REGISTERING = 1 << 20
# Fewer freed bytes are left to the C library.
_WORTH_TRIMMING = 16 << 20
# Bytes that were freed since the C library was last asked to give memory back.
_freed = 0
# Reentrant: the memory may go while somebody counts.
_counting = threading.RLock()


def aligned(size: int) -> int:
    """``size`` rounded up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class DeviceBlock:
    """One allocation in a region of the library's; freed when no tensor lies in it any more."""

    def __init__(self, library: _library.Library, region: int, size: int, device: int) -> None:
        library.region_enter(region, device, False)
        try:
            self.pointer = library.allocate(size, device)
        finally:
            library.region_leave(region)
        self.size = size
        self.device = device
        weakref.finalize(self, _free, library, self.pointer).atexit = False

    def bytes(self, torch: Any, offset: int, size: int) -> Any:
        """``size`` bytes from ``offset`` on as a tensor with a storage of its own, which keeps the block alive."""
        return torch.as_tensor(_Exported(self, offset, size), device=torch.device("cuda", self.device))


class _Exported:
    """A piece of a block, for whoever reads ``__cuda_array_interface__``."""

    def __init__(self, block: DeviceBlock, offset: int, size: int) -> None:
        self._block = block
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (block.pointer + offset, False),
            "version": 2,
        }


def _free(library: _library.Library, pointer: int) -> None:
    """Runs wherever the last tensor dies; a failure there has nobody to go to, and the memory stays."""
    library.c.sire_free(pointer)


class HostBlock:
    """Host memory of a fixed size, zero at first: anonymous, or a file without a name on the disk.

    ``pieces`` are `memoryview`\\ s; the memory goes when the last of them and of the tensors over them is gone.
    """

    def __init__(self, size: int, *, on_disk: bool = False) -> None:
        self.size = size
        self._map = _on_disk(size) if on_disk else _anonymous(size)
        self._view = memoryview(self._map)
        self._on_disk = on_disk
        self.registered = False

    def piece(self, offset: int, size: int) -> memoryview:
        """``size`` bytes from ``offset`` on."""
        return self._view[offset : offset + size]

    def register(self, torch: Any) -> None:
        """Makes copies fast, where the driver knows how: as far as the process may lock memory. Once."""
        if self.registered or self._on_disk or self.size < _WORTH_REGISTERING:
            return
        self.registered = True
        runtime = torch.cuda.cudart()
        address = host_bytes(torch, self._view).data_ptr()
        if int(runtime.cudaHostRegister(address, self.size, 0)) == 0:
            self._map.unregister = partial(runtime.cudaHostUnregister, address)
        else:
            _forget_error(torch)

    def tidy(self) -> None:
        """On the disk: what was written goes there, and leaves host memory."""
        if self._on_disk:
            self._map.flush()
            self._map.madvise(mmap.MADV_DONTNEED)


class _Map(mmap.mmap):
    """Mapped memory that is taken from the driver before it goes from the process."""

    unregister: Callable[[], object] | None = None
    taken = 0
    """Bytes of host memory in all of them that count."""
    _counted = 0

    def counts(self, size: int) -> None:
        """These bytes count as host memory of backups."""
        with _counting:
            self._counted = size
            _Map.taken += size

    def __del__(self) -> None:
        with _counting:
            _Map.taken -= self._counted
        if self.unregister is not None:
            self.unregister()


def _forget_error(torch: Any) -> None:
    """The runtime keeps a refusal for whoever asks next: PyTorch, after a kernel that is fine, would raise it."""
    runtime = _torch.runtime(torch)
    if runtime is not None:
        runtime.cudaGetLastError()


def give_freed_memory_back(freed: int) -> None:
    """What was freed goes to the operating system, where the C library (glibc) would keep it for later: after a model
    has moved, that is as much as the model. ``freed`` more bytes: as long as all together are few, nothing is done.
    """
    global _freed
    with _counting:
        _freed += freed
        if _freed < _WORTH_TRIMMING:
            return
        _freed = 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class FileBlock:
    """A file's content as memory; what is written there stays in this process, the file as it is."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._view = memoryview(self._map)

    def piece(self, offset: int, size: int) -> memoryview:
        """``size`` bytes from ``offset`` on."""
        return self._view[offset : offset + size]


def host_bytes(torch: Any, piece: memoryview) -> Any:
    """The piece as a byte tensor with a storage of its own, which keeps the piece alive."""
    return torch.frombuffer(piece, dtype=torch.uint8)


def _anonymous(size: int) -> _Map:
    """Within the library's limit for backups (``SIRE_HOST_LIMIT``, the control group's, the machine's)."""
    host = next(tier for tier in _library.load().stats()["tiers"] if tier["tier"] == "host")
    limit, taken = host["limit_bytes"], int(host["used_bytes"]) + _Map.taken
    if limit is not None and taken + size > limit:
        raise _no_room(size, f"host memory: {taken} of {limit} bytes are in use (SIRE_HOST_LIMIT). Use backup='disk'")
    try:
        made = _Map(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_room(size, f"host memory: {error}") from error
    made.counts(size)
    return made


def _on_disk(size: int) -> _Map:
    directory = _library.load().disk_directory or os.environ.get("SIRE_DISK_DIR") or None
    try:
        if directory:
            # As the library does when it needs it.
            os.makedirs(directory, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory, prefix="sire-") as file:
            # Room for every byte, so that no write into the mapping can fail later.
            os.posix_fallocate(file.fileno(), 0, size)
            return _Map(file.fileno(), size, flags=mmap.MAP_SHARED)
    except OSError as error:
        raise _no_room(size, f"the disk ({directory or tempfile.gettempdir()}): {error}") from error


def _no_room(size: int, where: str) -> OutOfBackupSpaceError:
    return OutOfBackupSpaceError(f"{size} bytes for a module's tensors cannot be had in {where}")
