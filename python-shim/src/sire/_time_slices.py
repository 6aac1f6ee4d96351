"""Time slices: trainings that each need most of a GPU share it by turns.

    with sire.time_slice(quantum=30):
        train()                  # as ever; the other training does the same

One of a group's processes has the device; the others wait at a safe point, with everything that they have paused and
kept. This module sees to it that "everything" is true (PyTorch's own pool lies in the process-wide region), and has the
context manager; turns are the library's.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from . import _hooks, _interrupt, _library, _torch, _workspaces, control
from ._errors import BusyError, InvalidArgumentError, ReservationTimeoutError, UnsupportedError
from ._regions import make_policy
from ._tags import encode_tag
from ._threads import starting

DEFAULT_QUANTUM = 30.0
_TAG = "time-slice"


class TimeSlice:
    """What `time_slice` returns: a context manager that may be entered again, also inside itself."""

    def __init__(self, device: object, quantum: float, group: str, seconds: float) -> None:
        self._device, self._quantum, self._group, self._seconds = device, quantum, group, seconds

    def __enter__(self) -> TimeSlice:
        _enter(self._device, self._quantum, self._group, self._seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _leave()

    @property
    def figures(self) -> dict[str, Any]:
        """Turns, switches, seconds resident and waited, and what one switch costs; empty when nobody is inside."""
        return dict(_library.load().time_slice() or {}) if _library.is_loaded() else {}

    def __repr__(self) -> str:
        return f"<TimeSlice of {self._quantum:g} s in the group {self._group!r}>"


def time_slice(
    device: object = None, quantum: float = DEFAULT_QUANTUM, group: str = "", *, timeout: float | None = None
) -> TimeSlice:
    """A context manager inside which this process uses a GPU in turns with others of the same ``group``, of any user.

    Entering waits for the first turn: ``timeout`` seconds (None: for as long as it takes), then
    `ReservationTimeoutError`. After ``quantum`` seconds of a turn, and only if somebody waits, everything that this
    process has on its devices is paused at the next safe point (the end of an optimizer step, or `sire.safe_point`),
    with all content, and the call returns from there when the next turn has come. A turn lasts at least four times what
    pausing and resuming cost.

    Needs a hook mode in which Sire hears of everything that PyTorch allocates (``preload``, ``driver``,
    ``allocator``), and is to be entered before anything is on the GPU. Inside, what is allocated outside of all regions
    is in a region of its own. Refused to the ranks of a distributed training.
    """
    for name, value in (("quantum", quantum), ("timeout", math.inf if timeout is None else timeout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
            raise InvalidArgumentError(f"{name} is a number of seconds, not {value!r}")
    if not 0 < quantum < math.inf:
        raise InvalidArgumentError(f"quantum is a number of seconds, more than 0, not {quantum!r}")
    _encode(group)
    return TimeSlice(device, float(quantum), group, math.inf if timeout is None else float(timeout))


def _encode(group: object) -> bytes:
    """A group's name as the library takes it."""
    try:
        encoded = group.encode() if isinstance(group, str) and "\0" not in group else None
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"the group {str(group)[:40]!r} cannot be written as UTF-8") from None
    if encoded is None or len(encoded) > 255:
        raise InvalidArgumentError(f"group is a name of at most 255 bytes, not {group!r}")
    return encoded


_lock = threading.RLock()
"""Held while turns begin or end, which may have to wait for a pause or resume at a safe point: see `_alone`."""
_depth = 0
_pid = 0
_place: tuple[int, str] = (0, "")
_region_set = False


def _enter(device: object, quantum: float, group: str, seconds: float) -> None:
    global _depth, _pid, _place
    torch = _torch.ready_torch()
    index = 0 if torch is None else _torch.device_index(torch, device)
    with _alone():
        if _depth and _pid == os.getpid():
            if _place != (index, group):
                raise InvalidArgumentError(
                    f"this process takes turns on cuda:{_place[0]} in the group {_place[1]!r} already, and its turn "
                    "pauses everything that it has"
                )
            _depth += 1
            return
        _refuse_ranks(torch)
        if torch is not None:
            _refuse_unheard(torch)
        _wait_for_first(index, quantum, _encode(group), seconds)
        try:
            _hold_everything(torch)
            control.take_turns(True)
        except BaseException:
            control.take_turns(False)
            _release_region()
            _library.load().time_slice_close()
            raise
        _depth, _pid, _place = 1, os.getpid(), (index, group)


@contextmanager
def _alone() -> Iterator[None]:
    """No other thread begins or ends turns. In a callback, which what the other one waits for may wait for, this one
    does not wait.
    """
    if not _lock.acquire(blocking=not control.in_callbacks()):
        raise BusyError(
            "another thread is just beginning or ending time slices, which may wait for the pause or resume at a safe "
            "point that this callback (sire.before_pause, sire.after_resume) belongs to; enter or leave them after "
            "the safe point"
        )
    try:
        yield
    finally:
        _lock.release()


def _wait_for_first(index: int, quantum: float, group: bytes, seconds: float) -> None:
    library = _library.load()
    try:
        _interrupt.run(lambda: library.time_slice_open(index, quantum, group, seconds), library.cancel)
    except BusyError as error:
        raise ReservationTimeoutError(f"no turn on cuda:{index} within {seconds:g} s: {error}") from error
    except BaseException:
        # It may have come with the interruption.
        library.time_slice_close()
        raise


def _leave() -> None:
    global _depth
    with _alone():
        if _pid != os.getpid() or not _depth:
            # A forked child has no turns, its parent goes on; and who is not inside cannot leave.
            return
        _depth -= 1
        if _depth:
            return
        # Whatever interrupts this: nobody may be left waiting for a turn to end that nobody uses.
        try:
            torch = _torch.cuda_in_use()
            if torch is not None:
                with suppress(RuntimeError):
                    # What is free in PyTorch's cache is in nobody's way. Refused during a capture.
                    torch.cuda.empty_cache()
        finally:
            with _interrupt.deferred():
                _end()


def _end() -> None:
    global _depth
    try:
        _library.load().time_slice_close()
    except BusyError:
        # In a callback of its own pause or resume: nothing has ended.
        _depth = 1
        raise
    finally:
        if not _depth:
            control.take_turns(False)
            _release_region()


def _refuse_ranks(torch: Any) -> None:
    """Each rank would wait for a turn on its own GPU, and for its peers, which wait for theirs: for ever."""
    told = os.environ.get("WORLD_SIZE", "")
    ranks = int(told) if told.isdecimal() else 1
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = max(ranks, torch.distributed.get_world_size())
    if ranks > 1:
        raise UnsupportedError(
            f"this process is one of {ranks} ranks: each would take turns on a GPU of its own, and wait in its turn "
            "for peers that wait for theirs. Time slices are for trainings of one process"
        )


# --- everything is in a region -----------------------------------------------------------------------------------


def _refuse_unheard(torch: Any) -> None:
    if _hooks.preloaded():
        return
    if not _torch.whole_process_pluggable(torch):
        raise UnsupportedError(
            "a time slice has to pause everything that PyTorch has on the device, and in hook mode 'torch' Sire hears "
            "only of regions. Start the program with sire run (or LD_PRELOAD=$(sire path)), or call "
            "sire.use_allocator() before anything uses CUDA."
        )


def _hold_everything(torch: Any) -> None:
    """What threads allocate outside of all regions goes to a region with a backup, from the first byte on."""
    global _region_set
    library = _library.load()
    if torch is not None and _hooks.preloaded():
        _refuse_strays(torch, library)
    if _process_region(library) is None:
        policy = make_policy("cpu", False, True)
        library.process_region_set(library.region_open(encode_tag(_TAG), *policy.fields()))
        _region_set = True


def _process_region(library: _library.Library) -> int | None:
    """The region of threads that are in none. The calling one may be inside another, or of `sire.disable`."""
    with ThreadPoolExecutor(1, "sire-time-slice") as fresh:
        with starting():
            region = fresh.submit(library.region_current)
        return region.result()


def _refuse_strays(torch: Any, library: _library.Library) -> None:
    torch.cuda.empty_cache()
    found = [each for each in _torch.segments(torch, (0, 0)) if not library.owns(int(each["address"]))]
    strays = sum(int(each["total_size"]) for each in found if not _workspaces.holds(each))
    if strays:
        raise UnsupportedError(
            f"{strays} bytes of tensors were on the device before the time slice began, outside of every region, so "
            "that they could not make room for others. Enter sire.time_slice() before anything is on the GPU, or "
            "start with SIRE_REGION set."
        )


def _release_region() -> None:
    global _region_set
    if _region_set:
        _region_set = False
        _library.load().process_region_set(None)


# --- the environment ---------------------------------------------------------------------------------------------


def enter_as_told() -> None:
    """SIRE_TIME_SLICE=SECONDS is a time slice for as long as the process lives: ``import sire`` waits for its turn.

    Processes that this one starts do not inherit the variable: they would wait for their own parent.
    """
    told = os.environ.pop("SIRE_TIME_SLICE", "")
    group = os.environ.pop("SIRE_TIME_SLICE_GROUP", "")
    if not told:
        return
    try:
        quantum = float(told)
    except ValueError:
        raise InvalidArgumentError(
            f"SIRE_TIME_SLICE is {told!r}; it must be how many seconds a turn lasts, such as 30"
        ) from None
    import torch  # noqa: F401  # what is to be shared by turns is a training of its

    time_slice(quantum=quantum, group=group).__enter__()
