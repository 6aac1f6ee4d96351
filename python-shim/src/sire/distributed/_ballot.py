"""How ranks agree: three rounds over the job's key-value store, each with one verdict.

In a *round* every rank tells the others how it stands and waits for all of them; then each proposes a verdict, and
the store takes the first proposal only. So all ranks that reach the store follow the same verdict, also if one has
run out of patience in the moment in which the last answer came. Nothing here uses a collective: it works with every
backend, needs no memory on a device, and a rank that has died is simply one that does not answer.

The store may outlive the process group (the launcher's does), with the keys of its last call. So calls are counted
within a *series*, which begins with each new store object and has a number that no rank uses twice: where a verdict is
that all is well, all ranks have voted for it in this very call. Ranks that are not in the same series wait for each
other in vain, and whoever is behind follows at its next call.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from .._errors import InvalidArgumentError, SireError, UnsupportedError

_PAUSES = (0.001, 0.05)
"""Seconds between two looks into the store: at first, and at most."""


@dataclass(frozen=True)
class Failure:
    """Why there is nothing to commit."""

    rank: int
    reason: str
    status: int = SireError.status


@dataclass(frozen=True)
class Members:
    """The ranks of a group, and where they meet."""

    store: Any
    name: str
    rank: int
    """This rank, within the group."""
    size: int


def members(group: Any) -> Members:
    """The ranks of a process group; of None, all."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_available() or not dist.is_initialized():
        raise UnsupportedError(
            "sire.distributed works on torch.distributed: call torch.distributed.init_process_group on every rank first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise InvalidArgumentError(f"this process (rank {dist.get_rank()}) is not in the group")
    store = distributed_c10d._get_default_store()
    ranks = dist.get_process_group_ranks(group)
    return Members(store, "-".join(map(str, ranks)), rank, len(ranks))


_ROUNDS = ("called", "prepared", "committed")


@dataclass
class _Calls:
    """What one rank has called on one group, through one store object."""

    series: int = 0
    """The number of the series; 0 before the first call."""
    count: int = 0
    """Calls in the series."""
    stale: list[str] = field(default_factory=list)
    """Prefixes of calls whose keys are in the store."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, members: Members) -> str:
        """The prefix of this rank's next call."""
        with self.lock:
            if self.series == 0:
                self._begin_series(members)
            while members.store.check([_begun(members, self.series + 1)]):
                self._begin_series(members)
            prefix = f"sire/{members.name}/{self.series}/{self.count}"
            self.count += 1
            return prefix

    def _begin_series(self, members: Members) -> None:
        """The one behind the last that this rank has begun, in this process group or in an earlier one."""
        self.series, self.count = int(members.store.add(f"sire/{members.name}/rank/{members.rank}", 1)), 0
        members.store.set(_begun(members, self.series), "")


def _begun(members: Members, series: int) -> str:
    """The key that is there as soon as some rank has begun a series, and so has left those before."""
    return f"sire/{members.name}/{series}/begun"


# By store object: a new process group has a new one, and begins anew.
_calls: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], _Calls]] = weakref.WeakKeyDictionary()
_calls_lock = threading.Lock()


class Ballot:
    """One call's rounds. Every rank makes the same calls on a group in the same order."""

    def __init__(self, members: Members, timeout: float) -> None:
        self._members = members
        self._timeout = timeout
        with _calls_lock:
            groups = _calls.setdefault(members.store, {})
            self._calls = groups.setdefault((members.name, members.rank), _Calls())
        self._prefix = self._calls.begin(members)
        with _calls_lock:
            self._earlier = list(self._calls.stale)
            self._calls.stale.append(self._prefix)

    def round(self, name: str, word: str, failure: Failure | None) -> Failure | None:
        """Tells how this rank stands (``word`` must be the same on all), waits for all, and returns the verdict: None
        if all is well.

        A failure is proposed at once, without waiting for anybody.
        """
        mine = json.dumps([word, None if failure is None else asdict(failure)])
        self._set(self._key(name, self._members.rank), mine)
        verdict = self._propose(name, failure if failure is not None else self._await_others(name, word))
        if name == _ROUNDS[0] and verdict is None:
            self._forget_earlier_calls()
        return verdict

    def withdraw(self, failure: Failure) -> Failure | None:
        """This rank cannot go on: it proposes the failure in the first round that is not decided yet, whether it has
        voted there or not. Returns the verdict that counts for all: None if it comes too late, because all have
        committed, this rank included. If the store cannot be reached the others run out of patience, and the failure
        counts here.
        """
        with suppress(Exception):
            for name in _ROUNDS:
                verdict = self._propose(name, failure)
                if verdict is not None:
                    return verdict
            return None
        return failure

    def _propose(self, name: str, proposal: Failure | None) -> Failure | None:
        fields = None if proposal is None else asdict(proposal)
        return _failure(json.loads(self._members.store.compare_set(self._key(name, "verdict"), "", json.dumps(fields))))

    def _forget_earlier_calls(self) -> None:
        """All ranks have begun this call, so that nobody reads keys of an earlier one: each takes its own away."""
        whose = [self._members.rank, *(["verdict"] if self._members.rank == 0 else [])]
        # A store that cannot forget keeps them.
        with suppress(Exception):
            for prefix in self._earlier:
                for name, what in itertools.product(_ROUNDS, whose):
                    self._members.store.delete_key(f"{prefix}/{name}/{what}")
        with _calls_lock:
            self._calls.stale = [prefix for prefix in self._calls.stale if prefix not in self._earlier]

    def _await_others(self, name: str, word: str) -> Failure | None:
        """What is to be proposed: the first failure that was told, or that somebody did not answer in time."""
        waiting = [rank for rank in range(self._members.size) if rank != self._members.rank]
        end, sleep = time.monotonic() + self._timeout, _PAUSES[0]
        while True:
            for rank in [rank for rank in waiting if self._is_set(self._key(name, rank))]:
                waiting.remove(rank)
                said, failure = json.loads(self._members.store.get(self._key(name, rank)))
                if failure is not None:
                    return _failure(failure)
                if said != word:
                    return Failure(rank, f"it called {said}, and rank {self._members.rank} called {word}")
            if not waiting or self._is_set(self._key(name, "verdict")):
                return None
            if time.monotonic() >= end:
                return Failure(waiting[0], f"it did not answer within {self._timeout:g} seconds; is it alive?")
            time.sleep(sleep)
            sleep = min(2 * sleep, _PAUSES[1])

    def _key(self, name: str, what: object) -> str:
        return f"{self._prefix}/{name}/{what}"

    def _set(self, key: str, value: str) -> None:
        self._members.store.set(key, value)

    def _is_set(self, key: str) -> bool:
        return bool(self._members.store.check([key]))


def _failure(fields: dict[str, Any] | None) -> Failure | None:
    return None if fields is None else Failure(**fields)
