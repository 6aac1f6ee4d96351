"""Pause and resume of all ranks, or of none.

Two phases. *Prepare*: each rank does its part so that it can be undone without loss. A pause is prepared by a lazy
one: the tag is paused and backed up, its memory and what nobody backs up stay on the device. Then all vote. *Commit*:
the memory goes. A resume has nothing left to do at commit, and is undone by a pause. What a rank had paused or
resumed before the call stays so if the call is undone. Between the two, and after the second, every rank waits for
all others; who does not answer in time counts as failed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from .. import _interrupt, _library, _transitions
from .._errors import InvalidArgumentError, RankError, SireError
from .._report import Report
from .._tags import encode_selection, is_within
from ._ballot import Ballot, Failure, members

_Work = Callable[[], Report]


def pause(tag: str | None = None, *, group: Any = None, timeout: float = 600.0, live_only: bool = True) -> Report:
    """`sire.pause` on every rank of a `torch.distributed` group (None: all), which all have to call; returns when all
    are done.

    If one rank fails, or does not come or answer within ``timeout`` seconds, all are undone, and all that live raise
    the same `RankError`, which says which rank and why. Nothing is lost by that, content without a backup included, as
    long as not all ranks were prepared; from then on it is gone, as after any pause.
    Collectives of the job must be over: see `suspend_nccl`. Returns this rank's report.
    """
    encoded = encode_selection(tag)

    def prepare() -> Report:
        return _transitions.pause(tag, live_only=live_only, release="lazy")

    def commit(prepared: Report) -> Report:
        library = _library.load()
        released = _interrupt.run(lambda: library.pause(encoded, None), library.cancel)
        moved = prepared.bytes_moved + released["bytes_moved"]
        seconds = prepared.seconds_total + released["seconds_total"]
        return dataclasses.replace(prepared, bytes_moved=moved, bytes_lazy=0, seconds_total=seconds)

    return _together("pause", tag, group, timeout, prepare, commit)


def resume(tag: str | None = None, *, group: Any = None, timeout: float = 600.0, wait: float = 0.0) -> Report:
    """`sire.resume` on every rank of a group, as `pause` does it. ``wait`` is as for `sire.resume`, on each rank."""
    return _together("resume", tag, group, timeout, lambda: _transitions.resume(tag, wait=wait), lambda report: report)


def _together(
    action: str, tag: str | None, group: Any, timeout: float, prepare: _Work, commit: Callable[[Report], Report]
) -> Report:
    encode_selection(tag)
    ballot, rank = _ballot(group, timeout)
    word = f"{action}({tag!r})"
    before: dict[str, str] = {}
    report: Report | None = None
    try:
        verdict = ballot.round("called", word, None)
        if verdict is None:
            before = _states(tag)
            report, failure = _attempt(rank, prepare)
            verdict = ballot.round("prepared", word, failure)
        if verdict is None and report is not None:
            prepared = report
            report, failure = _attempt(rank, lambda: commit(prepared))
            verdict = ballot.round("committed", word, failure)
    except BaseException as error:
        # Interrupted, or the store is gone. What all ranks have committed stays so here too, whatever came in between.
        with _interrupt.deferred():
            if ballot.withdraw(Failure(rank, f"{type(error).__name__}: {error}")) is not None:
                _undo(before, tag, error)
        raise
    if verdict is not None or report is None:
        verdict = verdict or Failure(rank, "it was undone")
        raise _undo(before, tag, _error(verdict, action, tag))
    return report


def _ballot(group: Any, timeout: object) -> tuple[Ballot, int]:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not math.isfinite(timeout) or timeout <= 0:
        raise InvalidArgumentError(f"timeout is a number of seconds above 0, not {timeout!r}")
    found = members(group)
    return Ballot(found, float(timeout)), found.rank


def _attempt(rank: int, work: _Work) -> tuple[Report | None, Failure | None]:
    try:
        return work(), None
    except Exception as error:
        status = error.status if isinstance(error, SireError) else SireError.status
        return None, Failure(rank, f"{type(error).__name__}: {error}", status)


def _error(failure: Failure, action: str, tag: str | None) -> RankError:
    what = "everything" if tag is None else f"tag {tag!r}"
    message = f"{action} of {what} was undone on all ranks, because of rank {failure.rank}: {failure.reason}"
    return RankError(message, failure.rank, failure.reason, failure.status)


def _states(tag: str | None) -> dict[str, str]:
    """The state of each tag that is meant: paused, if any of its regions is."""
    states: dict[str, str] = {}
    for region in _library.load().stats()["regions"]:
        name: str = region["tag"]
        if is_within(name, tag) and states.get(name) != "paused":
            states[name] = region["state"]
    return states


def _undo(before: dict[str, str], tag: str | None, error: BaseException) -> BaseException:
    """Brings every tag back to the state that it had, and each by itself: what is under it may have had another one.
    What cannot be is said in the error's message.
    """
    problems = []
    for name in sorted(before):
        if _states(tag).get(name, before[name]) == before[name]:
            continue
        try:
            _transitions.bring_back(name, before[name])
        except Exception as problem:
            problems.append(f"{name!r} could not be brought back to {before[name]!r} here: {problem}")
    if problems and isinstance(error, SireError):
        error.args = (f"{error}; {'; '.join(problems)}",)
    return error
