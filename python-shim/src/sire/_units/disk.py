"""The disk tier of units: tensors in private files, compressed without loss where that helps.

A file belongs to one process and is readable by its owner alone. A forked child reads its parent's files while they are
there and removes none; what it writes itself is in a directory of its own. What is written is checked when it is read
(CRC-32 of every record). Compression works on byte planes: the first bytes of all elements, then the second ones, and
so on. Of weights, exponents repeat and mantissas do not, so each plane is judged by a sample and is compressed only if
it shrinks.

A directory that a killed process left is removed by the next process that uses the same place: a lock that the dead
do not hold tells them apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import stat
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .._errors import BackupIoError, InvalidArgumentError, OutOfBackupSpaceError
from . import forks

_PREFIX = "sire-units-"
_PIECE = 4 << 20
_SAMPLE = 16 << 10
# A plane is compressed if its sample shrinks below this share.
_WORTH_COMPRESSING = 0.9
_LEVEL = 1
# Seconds in which a directory may have no lock yet.
_YOUNG = 60


@dataclass(frozen=True)
class _Record:
    """One plane of one piece of a tensor."""

    stored: int
    size: int
    compressed: bool
    checksum: int


@dataclass
class Stored:
    """What one file holds: for each tensor its width in bytes per element, and its records in order."""

    path: Path
    sizes: list[int]
    widths: list[int]
    records: list[list[_Record]] = field(default_factory=list)
    stored_bytes: int = 0

    @property
    def raw_bytes(self) -> int:
        """Bytes of the tensors themselves."""
        return sum(self.sizes)


class DiskStore:
    """A private directory of files, with a limit on their bytes. Safe for threads. ``limit`` None: no limit."""

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, limit: int | None = None, compress: bool = True
    ):
        self._parent = None if directory is None else Path(directory)
        self._limit = limit
        self._compress = compress
        self._made = 0
        self.begin_anew()
        forks.join(self)

    def begin_anew(self) -> None:
        """There are no files of this process yet."""
        self._lock = threading.Lock()
        self._home: Path | None = None
        self._files: dict[Path, Stored] = {}
        self._reserved = 0
        self._finalizer: weakref.finalize[..., Any] | None = None

    @property
    def directory(self) -> Path:
        """Where files are, or would be."""
        return self._home or self._parent or Path(tempfile.gettempdir())

    @property
    def used(self) -> int:
        """Bytes on the disk."""
        with self._lock:
            return self._used()

    def _used(self) -> int:
        return sum(each.stored_bytes for each in list(self._files.values()))

    def info(self) -> dict[str, Any]:
        """Files, bytes on the disk (``stored_bytes``), bytes they stand for (``raw_bytes``), limit and directory."""
        with self._lock:
            files = list(self._files.values())
        return {
            "files": len(files),
            "stored_bytes": sum(each.stored_bytes for each in files),
            "raw_bytes": sum(each.raw_bytes for each in files),
            "limit_bytes": self._limit,
            "compressed": self._compress,
            "directory": str(self.directory),
        }

    def write(self, tensors: Sequence[Any]) -> Stored:
        """Writes dense CPU tensors to a new file. All or nothing: after an error there is no file."""
        sizes = [each.numel() * each.element_size() for each in tensors]
        self._reserve(sum(sizes))
        try:
            stored = Stored(self._new_path(), sizes, [each.element_size() for each in tensors])
            try:
                self._write(stored, tensors)
            except OSError as error:
                raise _no_space(stored.path, error) from error
            with self._lock:
                self._files[stored.path] = stored
            return stored
        finally:
            self._reserve(-sum(sizes))

    def read(self, stored: Stored, tensors: Sequence[Any]) -> None:
        """Fills dense CPU tensors with what `write` was given. `BackupIoError` if the file is not as it was left."""
        try:
            with stored.path.open("rb") as file:
                for tensor, width, records in zip(tensors, stored.widths, stored.records, strict=True):
                    _read_tensor(file, tensor, width, records, stored.path)
        except OSError as error:
            raise BackupIoError(f"cannot read {stored.path}: {error.strerror}; the tensors stay on the disk") from error

    def drop(self, stored: Stored) -> None:
        """Removes a file of this process. Repeating it is harmless. No lock: it is called wherever garbage is
        collected.
        """
        if self._files.pop(stored.path, None) is not None:
            with contextlib.suppress(OSError):
                stored.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes everything; the store can be used again afterwards."""
        with self._lock:
            finalizer, self._finalizer, self._home = self._finalizer, None, None
            self._files.clear()
        if finalizer is not None:
            finalizer()

    def _reserve(self, size: int) -> None:
        with self._lock:
            taken = self._used() + self._reserved
            if size > 0 and self._limit is not None and taken + size > self._limit:
                raise OutOfBackupSpaceError(
                    f"{size} bytes do not fit on the disk: {taken} of {self._limit} bytes are used in "
                    f"{self.directory}; the tensors stay in host memory. Raise max_disk_usage_gb or free some"
                )
            self._reserved += size

    def _new_path(self) -> Path:
        with self._lock:
            if self._home is None:
                self._home, self._finalizer = _made_home(self._parent, self)
            self._made += 1
            return self._home / f"{self._made:06}.tensors"

    def _write(self, stored: Stored, tensors: Sequence[Any]) -> None:
        descriptor = os.open(stored.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for tensor in tensors:
                    stored.records.append([self._put(file, plane) for plane in _planes(tensor, self._compress)])
        except BaseException:
            stored.path.unlink(missing_ok=True)
            raise
        stored.stored_bytes = sum(record.stored for records in stored.records for record in records)

    def _put(self, file: Any, plane: memoryview) -> _Record:
        packed: bytes | memoryview = plane
        if self._compress and _shrinks(plane[:_SAMPLE]):
            packed = zlib.compress(plane, _LEVEL)
        compressed = len(packed) < len(plane)
        packed = packed if compressed else plane
        _write_all(file, memoryview(packed))
        return _Record(len(packed), len(plane), compressed, zlib.crc32(packed))


def bytes_of(tensor: Any) -> memoryview:
    """The memory of a dense CPU tensor, which the view does not keep alive."""
    size = tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise InvalidArgumentError("a dense CPU tensor is needed")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr() if size else 1)).cast("B")


def _planes(tensor: Any, compress: bool) -> Iterator[memoryview]:
    """The tensor's bytes in pieces; to be compressed, each piece as its byte planes one after another."""
    for piece in _pieces(tensor):
        if compress and tensor.element_size() > 1:
            rows = piece.view(-1, tensor.element_size()).t().contiguous()
            for row in rows:
                yield bytes_of(row)
        else:
            yield bytes_of(piece)


def _pieces(tensor: Any) -> Iterator[Any]:
    """Views of at most a few MiB, of whole elements, as bytes."""
    import torch

    flat = tensor.detach().view(-1)
    if flat.numel():
        yield from flat.view(torch.uint8).split(_PIECE)


def _shrinks(sample: memoryview) -> bool:
    return len(zlib.compress(sample, _LEVEL)) < _WORTH_COMPRESSING * len(sample)


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _read_tensor(file: BinaryIO, tensor: Any, width: int, records: list[_Record], path: Path) -> None:
    import torch

    left = iter(records)
    for piece in _pieces(tensor):
        first = next(left)
        if first.size == piece.numel():
            _get(file, first, bytes_of(piece), path)
            continue
        rows = torch.empty(width, piece.numel() // width, dtype=torch.uint8)
        _get(file, first, bytes_of(rows[0]), path)
        for row in rows[1:]:
            _get(file, next(left), bytes_of(row), path)
        piece.view(-1, width).copy_(rows.t())


def _get(file: BinaryIO, record: _Record, into: memoryview, path: Path) -> None:
    packed = file.read(record.stored)
    if len(packed) != record.stored or zlib.crc32(packed) != record.checksum:
        raise BackupIoError(
            f"{path} is not as it was written: somebody changed or cut it. The tensors stay on the disk; put the file "
            "back and repeat the call"
        )
    into[:] = zlib.decompress(packed, bufsize=record.size) if record.compressed else packed


def _no_space(path: Path, error: OSError) -> OutOfBackupSpaceError:
    return OutOfBackupSpaceError(
        f"cannot write {path}: {error.strerror}; the tensors stay in host memory. Free space, or name another directory"
    )


def _made_home(parent: Path | None, store: DiskStore) -> tuple[Path, weakref.finalize[..., Any]]:
    """A directory of this process's own, locked as long as it lives, and what removes it."""
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent or Path(tempfile.gettempdir()))
        home = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _no_space(parent or Path(tempfile.gettempdir()), error) from error
    return home, weakref.finalize(store, _removed, home, lock, os.getpid())


def _removed(home: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has its parent's finalizers
        shutil.rmtree(home, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Removes what killed processes left. Others may write here, too: nothing but this user's own directories."""
    for home in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = home.lstat()
            is_own = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode)
            if not is_own or time.time() - found.st_mtime < _YOUNG:
                continue
            lock = os.open(home / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(home, ignore_errors=True)
            finally:
                os.close(lock)
