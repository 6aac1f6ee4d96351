"""The package's one tree of exceptions, and how a status of the library becomes one of them.

Everything that Sire raises is a `SireError`, which is a `RuntimeError`. A missing-memory error is also
``torch.OutOfMemoryError`` when PyTorch is loaded, so that code written for PyTorch catches it.
"""

from __future__ import annotations

import sys
from functools import cache


class SireError(RuntimeError):
    """Something that Sire was asked for did not happen; the message says what to do.

    ``status`` is the number that the library's C functions return for this class of failure.
    """

    status: int = 18

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status


class InvalidArgumentError(SireError, ValueError):
    """An argument is outside what the function accepts."""

    status = 1


class OutOfMemoryError(SireError):
    """Not enough physical memory on the device; nothing was lost, and the call can be repeated."""

    status = 2


class OutOfBackupSpaceError(SireError):
    """Not enough room for backups (host limit, control group, disk); nothing was lost."""

    status = 3


class UnknownTagError(SireError, LookupError):
    """No region has this tag."""

    status = 4


class UnknownAddressError(SireError, LookupError):
    """The memory was not allocated in a region."""

    status = 5


class PausedError(SireError):
    """The region is paused, and the call needs it resident."""

    status = 6


class BusyError(SireError):
    """The region is in use: a thread is inside it, or another pause or resume runs."""

    status = 7


class CapturingError(SireError):
    """A CUDA graph is being captured: memory must not change under it now."""

    status = 8


class CancelledError(SireError):
    """The call was cancelled and rolled back."""

    status = 9


class BackupIoError(SireError):
    """Reading or writing a backup failed."""

    status = 10


class NoDriverError(SireError):
    """There is no usable driver or device."""

    status = 11


class UnsupportedError(SireError):
    """The environment cannot be served, for the reason that the message gives."""

    status = 12


class DeviceLostError(SireError):
    """The device context is lost; only a new process helps."""

    status = 13


class DriverError(SireError):
    """The driver failed in another way."""

    status = 14


class InactiveError(SireError):
    """The library is not active in this process: hook not live, forked child, or being unloaded."""

    status = 15


class VersionMismatchError(SireError):
    """The library belongs to another build of the package."""

    status = 16


class PausedAfterFailureError(SireError):
    """A transition could not be undone; the tag is paused, and every byte is in a backup."""

    status = 17


class InternalError(SireError):
    """A bug in Sire."""

    status = 18


class RankError(SireError):
    """A pause or resume of several ranks came to nothing, because of one of them; all ranks raise it, and all were
    undone.

    ``status`` is that of what happened on the rank, as far as that was an error of Sire's.
    """

    def __init__(self, message: str, rank: int, reason: str, status: int | None = None) -> None:
        super().__init__(message, status)
        self.rank = rank
        """The rank, within the group, on which it failed."""
        self.reason = reason
        """What happened there."""


class LibraryNotFoundError(SireError, ImportError):
    """``libsire_alloc.so`` is not where it is looked for."""

    status = 15


class ReservationTimeoutError(BusyError, TimeoutError):
    """A reservation was not to be had in the time given; nothing is reserved."""


class ProbeError(SireError):
    """A probe did not come to its end; the message has what its process said."""


class ProbeTimeoutError(ProbeError, TimeoutError):
    """A probe took too long, and its process was ended."""


_BY_STATUS: dict[int, type[SireError]] = {
    kind.status: kind
    for kind in (
        InvalidArgumentError,
        OutOfMemoryError,
        OutOfBackupSpaceError,
        UnknownTagError,
        UnknownAddressError,
        PausedError,
        BusyError,
        CapturingError,
        CancelledError,
        BackupIoError,
        NoDriverError,
        UnsupportedError,
        DeviceLostError,
        DriverError,
        InactiveError,
        VersionMismatchError,
        PausedAfterFailureError,
        InternalError,
    )
}


@cache
def _torch_out_of_memory_error() -> type[SireError] | None:
    """`OutOfMemoryError` that is PyTorch's as well; None when PyTorch is not loaded."""
    theirs = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    if theirs is None:
        return None
    body = {"__doc__": OutOfMemoryError.__doc__, "__module__": OutOfMemoryError.__module__}
    return type("OutOfMemoryError", (OutOfMemoryError, theirs), body)


def error_class(status: int) -> type[SireError]:
    """The exception class of a status; `SireError` for one that this package does not know."""
    if status == OutOfMemoryError.status:
        if "torch" not in sys.modules:
            return OutOfMemoryError
        _forget_if_torch_is_new()
        return _torch_out_of_memory_error() or OutOfMemoryError
    return _BY_STATUS.get(status, SireError)


def error_for(status: int, message: str) -> SireError:
    """The exception for a failed library call."""
    return error_class(status)(message or f"the library returned status {status}", status)


def _forget_if_torch_is_new() -> None:
    if _torch_out_of_memory_error() is None:
        _torch_out_of_memory_error.cache_clear()


def raise_kept(kept: list[BaseException]) -> None:
    """Raises the first of some errors, if there is one, and empties the list.

    A frame that has an error in a variable and the error, whose traceback has the frame, hold each other, and with them
    the variables of all callers, tensors too, until garbage is collected: so nobody has it when it is raised.
    """
    if not kept:
        return
    error = kept[0]
    kept.clear()
    try:
        raise error
    finally:
        del error
