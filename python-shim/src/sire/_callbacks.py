"""Callbacks of whoever has handed memory out: before it goes, and after it is there again.

A library that keeps addresses or physical handles to itself (NCCL's registered buffers, an RDMA registration, a
captured descriptor) has to let go before a pause and to take hold again after a resume. Callbacks run in the thread
that calls `sire.pause`, `sire.resume` or `sire.switch`, with no lock held. What the library does by itself (making
way when memory is short) calls nobody: it is written in Rust, and may happen under PyTorch's allocator lock.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import _library
from ._errors import InvalidArgumentError, PausedAfterFailureError, raise_kept
from ._tags import encode_tag, is_within

Function = Callable[[str | None], Any]
Fields = dict[str, Any]


@dataclass(eq=False)
class Callback:
    """A callback that was registered; `remove` takes it back."""

    function: Function
    tag: str | None

    def remove(self) -> None:
        """It is not called any more. Nothing happens the second time."""
        with _lock:
            for registered in (_before, _after):
                if self in registered:
                    registered.remove(self)

    def concerns(self, tag: str | None) -> bool:
        """Whether it is about regions that ``tag`` means."""
        return self.tag is None or tag is None or is_within(self.tag, tag) or is_within(tag, self.tag)


_before: list[Callback] = []
_after: list[Callback] = []
_lock = threading.Lock()


def before_pause(function: Function, *, tag: str | None = None) -> Callback:
    """``function(tag)`` is called before a pause of a tag (None: of everything) takes memory that is there.

    With ``tag``, only for regions of that tag, above or below it. In the order of registration. What it raises
    refuses the pause: nothing is paused, and the `after_resume` callbacks that concern the same tags are called, so
    those must not mind being called without a pause before. Also before the pausing half of `sire.switch`.
    """
    return _register(_before, function, tag)


def after_resume(function: Function, *, tag: str | None = None) -> Callback:
    """``function(tag)`` is called when memory is there again: after a resume, and after a pause that failed or was
    refused.

    In the reverse order of registration. All are called; then the first exception is raised, and the memory is there
    all the same. Of a resume with ``non_blocking``, by whoever is told by its `Progress` that it is over. Ctrl-C that
    comes too late to stop a resume is raised after the calls; one that comes too late to stop a pause leads to none.
    """
    return _register(_after, function, tag)


@contextmanager
def around_pause(tag: str | None, done: list[Fields]) -> Iterator[None]:
    """A pause: calls those who must let go; if it comes to nothing, those who may take hold again.

    The call into the library puts into ``done`` what it did, so that this is known though its caller is interrupted.
    """
    concerned = [each for each in _all(_before) if each.concerns(tag)]
    again = any(each.concerns(tag) for each in _all(_after))
    if not (concerned or again) or not _is_any(tag, "resident"):
        yield
        return
    try:
        for each in concerned:
            each.function(tag)
        yield
    except PausedAfterFailureError:
        raise
    except BaseException as error:
        if not done:
            _tell(tag, error)
        raise


@contextmanager
def around_resume(tag: str | None, done: list[Fields]) -> Iterator[None]:
    """A resume: if memory has come back, calls those who may take hold again. It is the last one in ``done``, which is
    as for `around_pause`.
    """
    try:
        yield
    except BaseException as error:
        if _has_changed(done):
            _tell(tag, error)
        raise
    if _has_changed(done):
        _tell(tag, None)


def _has_changed(done: list[Fields]) -> bool:
    return bool(done) and done[-1]["regions_changed"] > 0


def leaving(tag: str | None) -> None:
    """A pause from outside is about to take memory; what a callback raises refuses it."""
    concerned = [each for each in _all(_before) if each.concerns(tag)]
    if concerned and _is_any(tag, "resident"):
        for each in concerned:
            each.function(tag)


def resumed(tag: str | None) -> None:
    """A resume has brought memory back."""
    _tell(tag, None)


def _register(registered: list[Callback], function: Function, tag: str | None) -> Callback:
    if not callable(function):
        raise InvalidArgumentError(f"a callback is a function of a tag, not {function!r}")
    if tag is not None:
        encode_tag(tag)
    callback = Callback(function, tag)
    with _lock:
        registered.append(callback)
    return callback


def _all(registered: list[Callback]) -> list[Callback]:
    with _lock:
        return list(registered)


def _tell(tag: str | None, failure: BaseException | None) -> None:
    """Calls all; an exception of theirs is noted on ``failure``, or raised at the end."""
    kept: list[BaseException] = [] if failure is None else [failure]
    for each in reversed([each for each in _all(_after) if each.concerns(tag)]):
        try:
            each.function(tag)
        except Exception as error:
            if not kept:
                kept.append(error)
            elif sys.version_info >= (3, 11):
                kept[0].add_note(f"Sire: a callback after the resume failed, too: {error!r}")
    if failure is None:
        raise_kept(kept)


def _is_any(tag: str | None, state: str) -> bool:
    regions = _library.load().stats()["regions"]
    return any(each["state"] == state for each in regions if is_within(each["tag"], tag))
