"""Pause, pre-copy and resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

from . import _blocks, _callbacks, _hooks, _interrupt, _library, _memory, _moving, _registration, _torch
from ._callbacks import Fields
from ._errors import CapturingError, InvalidArgumentError, UnsupportedError
from ._placing import with_room
from ._progress import Progress, order_ranges
from ._report import Report
from ._sizes import format_size
from ._tags import encode_selection, encode_tag

Release = Literal["now", "lazy"]
Held = Literal["leave", "refuse"]


def pause(tag: str | None = None, *, live_only: bool = True, release: Release = "now", held: Held = "leave") -> Report:
    """Releases the physical memory of a tag and of the tags under it; without a tag, of all regions.

    Addresses stay. What has a backup policy is saved first; the rest is thrown away, and the report counts it.
    Nothing may use that memory until it is resumed: the call waits for the work that the device has been given, and
    threads that go on launching kernels on it meet an illegal address. Pausing without a tag therefore needs
    quiescence of everything that allocated in a region, a process-wide one (``SIRE_REGION``) included: threads under
    that one are not found out.

    Refused while any thread is inside such a region or a graph is being captured. Pausing what is paused
    changes nothing and says so. Ctrl-C rolls back.

    Blocks that PyTorch's cache holds free in the regions' pools are neither copied nor restored, and segments that are
    wholly free go back to the driver, unless ``live_only`` is false.

    ``release="lazy"`` backs everything up and pauses the tag, but its physical memory stays until somebody in this
    process needs it: an allocation or a resume that finds no room, `sire.trim`, or a pause of the tag without it. A
    resume before that costs nothing. Other processes cannot have the memory until then, nor can, in hook mode
    ``"torch"``, tensors outside of regions.

    Memory that was handed to other processes stays on the device, and the report counts it; with ``held="refuse"``
    the call raises `UnsupportedError` instead, with the reasons (`sire.held`), and nothing is paused.
    """
    if held not in ("leave", "refuse"):
        raise InvalidArgumentError(f"held is 'leave' or 'refuse', not {held!r}")
    if release not in ("now", "lazy"):
        raise InvalidArgumentError(f"release is 'now' or 'lazy', not {release!r}")
    encoded = encode_selection(tag)
    library = ready("pause")
    if held == "refuse":
        _refuse_held(tag)
    return _pause(library, tag, encoded, live_only, release == "lazy", [])


def _pause(
    library: _library.Library,
    tag: str | None,
    encoded: bytes | None,
    live_only: bool,
    lazy: bool,
    done: list[Fields],
    alone: bool = False,
) -> Report:
    """``done`` has the report's fields as soon as the tag is paused, also if Ctrl-C comes too late to stop that."""
    if lazy:
        _moving.note_lazy_pause()
    with _callbacks.around_pause(tag, done):
        blocks = _blocks.block_map() if live_only else None
        _interrupt.run(lambda: done.append(library.pause(encoded, blocks, lazy=lazy, alone=alone)), library.cancel)
    notes = (tuple(blocks.notes) if blocks else ()) + _registration.notes()
    return Report("pause", tag, **done[0], notes=notes)


def _refuse_held(tag: str | None) -> None:
    held = _memory.held(tag)
    if held:
        reasons = ", ".join(f"{format_size(size)} because {reason}" for reason, size in held.items())
        raise UnsupportedError(
            f"a pause would leave memory on the device: {reasons}. Free what was handed out, keep it in a "
            "region of its own, or pause with held='leave'."
        )


def pre_copy(tag: str | None = None) -> Report:
    """Backs up a tag, and the tags under it, while the program goes on using the memory.

    A later pause copies only what has changed since, so most of its copying is done before anybody waits for it. For
    regions opened with ``immutable`` or ``verify``: others are refused, because nothing would tell what has changed.

    The device is waited for once, before the first copy: all work that was given to it before this call is in the
    backup. What is written later is found by the pause (``verify``), or must not happen (``immutable``: this backup
    counts as the first one; `sire.changed` tells of exceptions). The regions stay open, also for other threads. A pause
    that comes meanwhile goes first. Ctrl-C, or a lack of host memory, ends the call; what was copied stays.
    """
    encoded = encode_selection(tag)
    library = ready("pre-copy")
    return Report("pre_copy", tag, **_interrupt.run(lambda: library.pre_copy(encoded), library.cancel))


@overload
def resume(tag: str | None = None, *, wait: float = 0.0, order: object = None) -> Report: ...


@overload
def resume(
    tag: str | None = None, *, wait: float = 0.0, order: object = None, non_blocking: Literal[True]
) -> Progress: ...


@overload
def resume(
    tag: str | None = None, *, wait: float = 0.0, order: object = None, non_blocking: bool
) -> Report | Progress: ...


def resume(
    tag: str | None = None, *, wait: float = 0.0, order: object = None, non_blocking: bool = False
) -> Report | Progress:
    """Brings memory, and what was backed up, back to the same addresses.

    Where memory is short, what PyTorch only caches is given back, as PyTorch does before an allocation fails
    (`sire.empty_cache`). ``wait`` is how many seconds to wait then for memory that somebody else still holds. If it
    does not come, the call fails with `OutOfMemoryError`, the tag stays paused with its backup, and the call can be
    repeated.

    ``order`` says what is to come back first: an `Order` that was learned, a module, or tensors. With
    ``non_blocking`` the call returns at once with a `Progress`, which tells what can be used already; PyTorch's cache
    is left alone then.
    """
    encoded = encode_selection(tag)
    seconds = _seconds(wait)
    ranges = order_ranges(order)
    library = ready("resume")
    if non_blocking:
        return Progress(library, library.resume_start(encoded, seconds, ranges), tag, _callbacks.resumed)
    done: list[Fields] = []

    def bring(patience: float) -> None:
        _interrupt.run(lambda: done.append(library.resume(encoded, patience, ranges)), library.cancel)

    with _callbacks.around_resume(tag, done):
        if _torch.cuda_in_use() is None:
            bring(seconds)
        else:
            with_room(lambda: bring(0.0), lambda: bring(seconds))
    return Report("resume", tag, **done[0])


def bring_back(tag: str, state: str) -> None:
    """The tag itself, without what is under it, is paused or resident again."""
    encoded = encode_tag(tag)
    library = ready("pause" if state == "paused" else "resume")
    done: list[Fields] = []
    if state == "paused":
        _pause(library, tag, encoded, live_only=True, lazy=False, done=done, alone=True)
        return

    def bring() -> None:
        _interrupt.run(lambda: done.append(library.resume(encoded, 0.0, alone=True)), library.cancel)

    with _callbacks.around_resume(tag, done):
        with_room(bring)


@overload
def prefetch(tag: str | None = None, *, order: object = None) -> Progress: ...


@overload
def prefetch(tag: object, **more: Any) -> Any: ...


def prefetch(tag: Any = None, *, order: object = None, **more: Any) -> Any:
    """Begins to bring memory back that will be needed soon, if there is room for it now; returns at once.

    Of a managed object (a module, or what `sire.manage` returns) that is `sire.models.prefetch`. Of a tag it is as
    ``resume(tag, non_blocking=True)``. Where there is no room, the `Progress` says so when somebody waits for it.
    """
    if tag is None or isinstance(tag, str):
        if more:
            raise TypeError(
                f"prefetch of a tag takes only order, not {', '.join(sorted(more))}: that is for managed objects"
            )
        return resume(tag, order=order, non_blocking=True)
    if order is not None:
        raise TypeError("prefetch of a managed object takes no order: it comes back in the order that was learned")
    from .models import prefetch as prefetch_object

    return prefetch_object(tag, **more)


def promote(tag: str | None = None) -> int:
    """Brings backups of ``backup="auto"`` from the disk back into host memory, as far as there is room there.

    For a tag that will be resumed soon, but not yet: its memory on the device stays away. Returns the bytes that moved.
    One that cannot be read is an error, which says how many came before; it stays where it is.
    """
    encoded = encode_selection(tag)
    return ready("promote").promote(encoded)


def switch(*, pause: str, resume: str, live_only: bool = True) -> tuple[Report, Report]:
    """Pauses one tag and resumes another in one call: both, or neither. Returns both reports.

    Faster than one after the other, and possible where the device cannot hold both: content travels in both
    directions at once, and physical memory goes from the one to the other as it becomes free. It does not wait for
    memory that somebody else holds. ``live_only`` is as for `pause`.
    """
    leaving, coming = encode_tag(pause), encode_tag(resume)
    library = ready("switch")
    done: list[Fields] = []
    with _callbacks.around_resume(resume, done), _callbacks.around_pause(pause, done):
        blocks = _blocks.block_map() if live_only else None
        _interrupt.run(lambda: done.extend(library.switch(leaving, coming, blocks)), library.cancel)
    left, came = done
    notes = tuple(blocks.notes) if blocks else ()
    return Report("pause", pause, **left, notes=notes), Report("resume", resume, **came)


@contextmanager
def paused(tag: str | None = None, *, wait: float = 0.0) -> Iterator[Report]:
    """The tag is paused inside, and resumed at the end, also when the body raises, or Ctrl-C comes too late to stop the
    pause.
    """
    encoded = encode_selection(tag)
    library = ready("pause")
    done: list[Fields] = []
    try:
        yield _pause(library, tag, encoded, live_only=True, lazy=False, done=done)
    finally:
        if done:
            resume(tag, wait=wait)


def ready(action: str) -> _library.Library:
    """The library, for a pause or resume; refused while a graph is being captured."""
    _hooks.hook_mode()
    if _torch.capturing():
        raise CapturingError(
            f"{action} during the capture of a CUDA graph: end the capture first, memory must not change under it"
        )
    return _library.load()


def _seconds(wait: object) -> float:
    if isinstance(wait, bool) or not isinstance(wait, int | float):
        raise InvalidArgumentError(f"wait is a number of seconds, not {wait!r}")
    if not math.isfinite(wait) or wait < 0:
        raise InvalidArgumentError(f"wait is 0 or more seconds, not {wait!r}")
    return float(wait)
