"""Reserving memory of a GPU among all processes of the machine.

A reservation has two halves. The *ledger* (in the library, a file that all processes share) says whose bytes they
are: who came first is served first, and who ends, however, holds nothing any more. The *fence* is the bytes
themselves, taken from the driver at once, so that processes that know nothing of the ledger cannot have them either;
and it is memory that this process's own allocations then use:

``stock``
    The library holds it and hands it out, to regions and to everything else that allocates through the hooks. For
    hook modes in which the library hears of every allocation (``preload``, ``allocator``).
``cache``
    PyTorch's own cache holds it, as free blocks. For hook mode ``torch``, where the library does not hear of
    allocations outside regions.
"""

from __future__ import annotations

import fcntl
import math
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from .. import _hooks, _interrupt, _library, _torch
from .._errors import (
    BusyError,
    InactiveError,
    InvalidArgumentError,
    LibraryNotFoundError,
    OutOfMemoryError,
    ReservationTimeoutError,
    SireError,
    UnsupportedError,
    VersionMismatchError,
    error_class,
)
from .._threads import starting
from .device import gpu_index, uuid

DEFAULT_MARGIN = 50 * 1024**2

Fence = Literal["stock", "cache", "none"]

# How often what this process owns is noted, where the library cannot see it.
_LOOK_SECONDS = 0.05
_NO_FENCE, _FENCE_IF_POSSIBLE, _STRICT_FENCE = 0, 1, 2

# What this process has by now: reservations in the ledger, by the GPU's ordinal, and bytes of what a process above has
# reserved for it, by the GPU's UUID. Process numbers would not tell: every container has its own.
_holding: Counter[int] = Counter()
_taken: Counter[str] = Counter()
_counting = threading.Lock()


class ReservationWarning(UserWarning):
    """A reservation is weaker than it was asked to be."""


def reserve_gpu_for_training(
    gpu: object = None,
    training_reserved_bytes: int = 0,
    safety_margin_bytes: int = DEFAULT_MARGIN,
    blocking: bool = True,
    timeout: float | None = None,
    fence: bool = True,
    *,
    strict: bool = False,
    preempt: int | None = None,
) -> ReserveGpu:
    """A context manager inside which bytes of a GPU are this process's; it gives the `Reservation`.

    ``training_reserved_bytes`` and ``safety_margin_bytes`` are reserved together. With 0 bytes the GPU is reserved
    for this process alone: no other reservation, and everything that is free but the margin. Under `sire reserve`
    they come out of what that has reserved, if this process has so much left of it (0 bytes: all of it), and of the
    margin as much as there is, with a `ReservationWarning` where that is less. Else it waits its turn:
    ``timeout`` seconds (None: for as long as it takes), or not at all with ``blocking=False``;
    `ReservationTimeoutError` after that. With ``fence=False`` only the ledger keeps the bytes; where a fence cannot
    be had, it alone does, with a `ReservationWarning`, or `OutOfMemoryError` if ``strict``. Without CUDA nothing is
    reserved. ``preempt``: a priority; where memory is short, processes of the same user are asked for what they have
    marked with `sire.reclaimable` at most at that, until the reservation ends.
    """
    for name, value in (
        ("training_reserved_bytes", training_reserved_bytes),
        ("safety_margin_bytes", safety_margin_bytes),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidArgumentError(f"{name} is {value!r}; it must be a number of bytes, 0 or more")
    if timeout is not None and not timeout >= 0:
        raise InvalidArgumentError(f"timeout is {timeout!r}; it must be None or a number of seconds, 0 or more")
    if preempt is not None and (isinstance(preempt, bool) or not isinstance(preempt, int) or abs(preempt) >= 2**31):
        raise InvalidArgumentError(f"preempt is {preempt!r}; it must be None or the need's priority, such as 0")
    if preempt is not None and training_reserved_bytes == 0:
        raise InvalidArgumentError(
            "nobody can give way for a whole GPU: say how many training_reserved_bytes are needed"
        )
    seconds = 0.0 if not blocking else math.inf if timeout is None else float(timeout)
    return ReserveGpu(gpu, training_reserved_bytes, safety_margin_bytes, seconds, fence, strict, preempt)


class ReserveGpu:
    """What `reserve_gpu_for_training` returns. May be entered again, inside itself or later: each time is a
    reservation of its own.
    """

    def __init__(
        self, gpu: object, wanted: int, margin: int, seconds: float, fence: bool, strict: bool, preempt: int | None
    ) -> None:
        self._gpu, self._wanted, self._margin = gpu, wanted, margin
        self._seconds, self._fence, self._strict, self._preempt = seconds, fence, strict, preempt
        self._entered: list[Reservation] = []

    def __enter__(self) -> Reservation:
        torch = _cuda()
        if torch is None:
            reservation = Reservation(None, "none", None, self._strict)
        else:
            index = gpu_index(torch, self._gpu)
            reservation = _reserve(
                torch, index, self._wanted, self._margin, self._seconds, self._fence, self._strict, self._preempt
            )
        self._entered.append(reservation)
        return reservation

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered.pop().release()


def _cuda() -> Any | None:
    """PyTorch, if it is there and can use a GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


class Reservation:
    """Bytes of one GPU, until `release`. Properties tell what it is now; `resize` makes it larger or smaller."""

    def __init__(self, index: int | None, fence: Fence, place: _Place | None, strict: bool) -> None:
        self._index, self._fence, self._place, self._strict = index, fence, place, strict
        self._lock = threading.RLock()

    @property
    def device_index(self) -> int | None:
        """The GPU's ordinal in this process; None without CUDA."""
        return self._index

    @property
    def fence(self) -> Fence:
        """What holds the bytes: the library's ``"stock"``, PyTorch's ``"cache"``, or ``"none"``."""
        return self._fence

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the ledger says are this process's; 0 without CUDA, without the library, and after `release`."""
        with self._lock:
            return 0 if self._place is None else self._place.reserved()

    @property
    def unused_bytes(self) -> int:
        """Bytes behind the fence that nothing uses yet."""
        with self._lock:
            return 0 if self._place is None else self._place.unused()

    def resize(self, size: int, timeout: float | None = None) -> None:
        """Makes it ``size`` bytes in all. More waits its turn, as a new reservation would; what there is stays
        meanwhile, and if it fails.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise InvalidArgumentError(f"a reservation has more than 0 bytes, not {size!r}; release() ends it")
        seconds = math.inf if timeout is None else float(timeout)
        with self._lock:
            if self._place is not None:
                self._place.resize(size, seconds, self._strict)

    def release(self) -> None:
        """Ends it: others can have the bytes that this process does not use. Once is enough."""
        with self._lock:
            place, self._place = self._place, None
        if place is not None:
            place.release()

    def __repr__(self) -> str:
        return f"<Reservation of {self.reserved_bytes} bytes on cuda:{self._index}, fence {self._fence}>"


class _Place:
    """A reservation as the ledger has it, without a fence: that this process owns some of the bytes is noted from
    time to time.
    """

    def __init__(self, torch: Any, index: int, handle: int) -> None:
        self._torch, self._index, self._handle = torch, index, handle
        self._base = _held(torch, index)
        self._noted = 0
        self._noting = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """From now on a thread notes what is owned."""
        self._thread = threading.Thread(target=self._watch, name="sire-reservation", daemon=True)
        with starting():
            self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            with suppress(SireError):
                self.note()

    def note(self) -> None:
        """Notes how much of it this process owns."""
        with self._noting:
            self._note(_held(self._torch, self._index))

    def _note(self, held: int) -> None:
        owned = max(0, held - self._base)
        if owned != self._noted:
            _library.load().reservation_note_owned(self._handle, owned)
            self._noted = owned

    def reserved(self) -> int:
        return _library.load().reservation_get(self._handle)[0]

    def unused(self) -> int:
        return 0

    def resize(self, size: int, seconds: float, strict: bool) -> None:
        _waiting(lambda library: library.reservation_resize(self._handle, size, seconds, _NO_FENCE), seconds, size)
        # Of a smaller one no more was owned than its size: it is to be said anew.
        self._noted = -1

    def release(self) -> None:
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            # One that did not come to its start cannot be waited for, and finds that it has ended.
            with suppress(RuntimeError):
                self._thread.join()
        _let_go(_library.load(), self._index, self._handle)


class _CachePlace(_Place):
    """The fence is free blocks of PyTorch's cache."""

    def fill(self) -> None:
        """Takes what is reserved and not there yet."""
        kept = []
        try:
            while (missing := self.reserved() - (_held(self._torch, self._index) - self._base)) > 0:
                # Blocks that were free before are taken first, so that the cache has to grow.
                kept.append(self._torch.empty(missing, dtype=self._torch.uint8, device=f"cuda:{self._index}"))
                self.note()
        finally:
            kept.clear()
            self.note()

    def unused(self) -> int:
        return min(self.reserved(), _torch.free_in_cache(self._torch, self._index))

    def resize(self, size: int, seconds: float, strict: bool) -> None:
        before = self.reserved()
        super().resize(size, seconds, strict)
        if size <= before:
            self._empty()
        try:
            _fill(self, strict)
        except BaseException:
            # What there was stays, and no more: others can have what could not be filled.
            if size > before:
                super().resize(before, 0.0, strict)
                self._empty()
                with suppress(RuntimeError):
                    self.fill()
            raise

    def _empty(self) -> None:
        """Gives the fence back to the driver. It counts as not owned before it goes, so that others leave it."""
        with self._noting:
            self._note(_held(self._torch, self._index) - _torch.free_in_cache(self._torch, self._index))
            self._torch.cuda.empty_cache()
            self._note(_held(self._torch, self._index))

    def release(self) -> None:
        with suppress(RuntimeError):
            # What is free in the cache is for others, before they are told. PyTorch refuses that during a capture.
            self._torch.cuda.empty_cache()
        super().release()


class _StockPlace(_Place):
    """The fence is the library's stock."""

    def unused(self) -> int:
        return min(_library.load().reservation_get(self._handle)[1:])

    def resize(self, size: int, seconds: float, strict: bool) -> None:
        fence = _STRICT_FENCE if strict else _FENCE_IF_POSSIBLE
        _waiting(lambda library: library.reservation_resize(self._handle, size, seconds, fence), seconds, size)


class _GivenPlace(_Place):
    """A part of what a process above has reserved for us (``sire reserve``): nothing is to be waited for."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size

    def reserved(self) -> int:
        return self._size

    def resize(self, size: int, seconds: float, strict: bool) -> None:
        with _counting:
            given, left = _given(self._name), _left(self._name)
            if size - self._size > left:
                raise UnsupportedError(
                    f"{given} bytes were reserved from outside, of which {left} are left, and {size} instead of "
                    f"{self._size} are wanted; give sire reserve --bytes more"
                )
            _taken[self._name] += size - self._size
            self._size = size

    def release(self) -> None:
        """Whoever reserved it ends it; until then it can be had again."""
        with _counting:
            _taken[self._name] -= self._size


class _LockPlace(_Place):
    """Without the library: a lock that one process of those without the library holds."""

    def __init__(self, lock: FileLock) -> None:
        self._file = lock

    def reserved(self) -> int:
        return 0

    def resize(self, size: int, seconds: float, strict: bool) -> None:
        """A lock has no size."""

    def release(self) -> None:
        self._file.release()


def _held(torch: Any, index: int) -> int:
    """Bytes of a GPU that this process's allocator has from the driver."""
    if not torch.cuda.is_initialized():
        return 0
    if _torch.whole_process_pluggable(torch):
        return int(_library.load().memory_stats(index)["reserved_bytes.all.current"])
    return int(torch._C._cuda_memoryStats(index)["reserved_bytes"]["all"]["current"])


def _fence_kind(torch: Any) -> Fence:
    if _torch.whole_process_pluggable(torch):
        return "stock"
    try:
        return "stock" if _hooks.hook_mode() in ("preload", "driver") else "cache"
    except InactiveError:
        return "cache"


def _waiting(call: Callable[[_library.Library], Any], seconds: float, size: int) -> Any:
    """A call that waits in the queue, and that Ctrl-C ends."""
    library = _library.load()
    try:
        return _interrupt.run(lambda: call(library), library.cancel)
    except BusyError as error:
        how = "at once" if seconds == 0 else f"within {seconds:g} s"
        what = f"{size} bytes" if size else "the GPU"
        raise ReservationTimeoutError(f"{what} could not be reserved {how}: {error}") from error


def _reserve(
    torch: Any,
    index: int,
    wanted: int,
    margin: int,
    seconds: float,
    fence: bool,
    strict: bool,
    preempt: int | None,
) -> Reservation:
    torch.cuda.init()
    given = _given_place(uuid(torch, index), wanted, margin)
    if given is not None:
        return Reservation(index, "none", given, strict)
    try:
        library = _library.load()
    except (LibraryNotFoundError, VersionMismatchError, OSError) as error:
        if strict:
            raise
        return _with_a_lock_only(torch, index, seconds, error)
    kind: Fence = _fence_kind(torch) if fence else "none"
    in_library = (_STRICT_FENCE if strict else _FENCE_IF_POSSIBLE) if kind == "stock" else _NO_FENCE
    size = wanted + margin if wanted else 0
    _refuse_waiting_for_ourselves(torch, index, size)
    try:
        handle = _handle(
            library, lambda: library.reserve(index, size, margin, seconds, in_library, preempt), seconds, size
        )
    except (InactiveError, UnsupportedError) as error:
        if strict:
            raise
        return _with_a_lock_only(torch, index, seconds, error)
    with _counting:
        _holding[index] += 1
    try:
        place, kind = _placed(torch, index, handle, kind, strict)
    except BaseException:
        _let_go(library, index, handle)
        raise
    try:
        if kind != "stock":
            place.watch()
        return Reservation(index, kind, place, strict)
    except BaseException:
        place.release()
        raise


def _handle(library: _library.Library, reserve: Callable[[], int], seconds: float, size: int) -> int:
    """The handle of a reservation; one that was made just as Ctrl-C came is released."""
    made: list[int] = []
    try:
        _waiting(lambda _library: made.append(reserve()), seconds, size)
    except BaseException:
        for handle in made:
            library.reservation_release(handle)
        raise
    return made[0]


def _let_go(library: _library.Library, index: int, handle: int) -> None:
    with _counting:
        _holding[index] -= 1
    library.reservation_release(handle)


def _given_place(name: str, wanted: int, margin: int) -> _GivenPlace | None:
    """What is wanted (0: all, if nothing of it is taken yet) of what was reserved from outside, and of the margin what
    there is beside it: whoever reserved it has decided how much there is in all. None if there is less.
    """
    with _counting:
        given, left = _given(name), _left(name)
        if left < max(1, wanted) or (wanted == 0 and left < given):
            return None
        size = min(left, wanted + margin) if wanted else left
        _taken[name] += size
    place = _GivenPlace(name, size)
    if wanted and size < wanted + margin:
        try:
            _warn_about_the_margin(given, size - wanted, margin)
        except BaseException:
            # Warnings may be errors.
            place.release()
            raise
    return place


def _warn_about_the_margin(given: int, had: int, margin: int) -> None:
    warnings.warn(
        f"a reservation has a margin of {had} bytes instead of {margin}: there is no more left of the {given} bytes "
        "that were reserved from outside; give sire reserve --bytes more, or ask for a smaller margin",
        ReservationWarning,
        stacklevel=5,
    )


def _left(name: str) -> int:
    """Bytes of what was given that this process has not taken."""
    return max(0, _given(name) - _taken[name])


def _given(name: str) -> int:
    """Bytes of a GPU that a process above has reserved for this one (``SIRE_RESERVED``: a UUID, a colon, bytes)."""
    gpu, _, size = os.environ.get("SIRE_RESERVED", "").rpartition(":")
    return int(size) if _bare(gpu) == _bare(name) and size.isdigit() else 0


def _bare(name: str) -> str:
    """A UUID as PyTorch has it: NVML says what it is of (a GPU, a part of one)."""
    return name.removeprefix("GPU-").removeprefix("MIG-")


def _placed(torch: Any, index: int, handle: int, kind: Fence, strict: bool) -> tuple[_Place, Fence]:
    if kind == "stock":
        place = _StockPlace(torch, index, handle)
        _, fenced, _ = _library.load().reservation_get(handle)
        if fenced > 0:
            return place, kind
        _warn("its bytes could not be taken from the driver", 5)
    elif kind == "cache":
        cached = _CachePlace(torch, index, handle)
        if _fill(cached, strict):
            return cached, kind
    return _Place(torch, index, handle), "none"


def _fill(place: _CachePlace, strict: bool) -> bool:
    try:
        place.fill()
    except RuntimeError as error:
        if strict:
            raise error_class(OutOfMemoryError.status)(
                f"the fence of a reservation could not be built: {error}"
            ) from error
        _warn(f"its bytes could not be taken from the driver ({error})")
        return False
    return True


def _warn(why: str, stacklevel: int = 6) -> None:
    warnings.warn(
        f"a reservation has no fence: {why}. Processes that use reservations leave the bytes alone, others may not.",
        ReservationWarning,
        stacklevel=stacklevel,
    )


def _refuse_waiting_for_ourselves(torch: Any, index: int, size: int) -> None:
    """Who has a reservation and asks for the GPU for itself alone would wait for itself."""
    if size > 0:
        return
    with _counting:
        has_some = _holding[index] > 0 or _taken[uuid(torch, index)] > 0
    if has_some:
        raise InvalidArgumentError(
            f"this process has reserved bytes of cuda:{index} already, so that the GPU cannot be reserved for it "
            "alone; say how many bytes are to be reserved beside them"
        )


# --- without the library ---------------------------------------------------------------------------------


def lock_directory() -> Path:
    """Where processes find each other: ``TORCHTOOLS_LOCK_DIR``, else ``/tmp``."""
    return Path(os.environ.get("TORCHTOOLS_LOCK_DIR") or "/tmp")  # noqa: S108


def _with_a_lock_only(torch: Any, index: int, seconds: float, why: Exception) -> Reservation:
    lock = take_lock(f"torchtools_gpu_lock_{uuid(torch, index)}.lock", seconds)
    try:
        _warn_about_the_lock(index, why)
    except BaseException:
        # Warnings may be errors.
        lock.release()
        raise
    return Reservation(index, "none", _LockPlace(lock), strict=False)


def _warn_about_the_lock(index: int, why: Exception) -> None:
    warnings.warn(
        f"cuda:{index} is locked, but nothing of it is reserved: {why}. Only processes in the same situation keep out.",
        ReservationWarning,
        stacklevel=5,
    )


class FileLock:
    """A file that this process has locked, until `release`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._owner = descriptor, os.getpid()

    def release(self) -> None:
        """Whoever was forked meanwhile does not keep it either, and cannot release it for us."""
        try:
            if os.getpid() == self._owner:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        finally:
            os.close(self._descriptor)


def take_lock(name: str, seconds: float) -> FileLock:
    """The lock of a file of this name; `ReservationTimeoutError` if it is not to be had in time, and
    `UnsupportedError` if the system does not give it at all.
    """
    path = lock_directory() / name
    with _named(path):
        descriptor = _open_lock(path)
    end = time.monotonic() + seconds
    try:
        while not _try_lock(descriptor, path):
            if time.monotonic() >= end:
                raise ReservationTimeoutError(f"another process holds the lock {name}")
            time.sleep(0.02)
        return FileLock(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def _try_lock(descriptor: int, path: Path) -> bool:
    """Whether nobody else has it, and we do now."""
    with _named(path):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system refuses inside is told with the lock's path."""
    try:
        yield
    except OSError as error:
        raise UnsupportedError(
            f"the lock {path} cannot be had: {error.strerror}. It has to be a file of its own, no link, in a directory "
            "that every process that reserves the GPU can write to; TORCHTOOLS_LOCK_DIR names another one"
        ) from error


def _open_lock(path: Path) -> int:
    """Opens without following a link, and without emptying what is there; all users may use it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        return os.open(path, flags)
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    try:
        os.fchmod(descriptor, 0o666)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
