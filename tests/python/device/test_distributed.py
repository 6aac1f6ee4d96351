"""`sire.distributed`: four processes with gloo on the device, a fault in one of them, a killed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sire
import torch
import torch.distributed as dist
from running import running
from sire.distributed import _ranks
from sire.distributed._ballot import Ballot, Failure, Members

PROGRAM = Path(__file__).resolve().with_name("rank_program.py")
SIZE, LAST = 4, 3
MIB = 1 << 20
CASES = ("round_trip", "fault_at_prepare", "fault_at_resume", "another_call", "a_group", "partly_paused", "killed")


def run_job(folder: Path, size: int, *cases: str) -> list[dict[str, Any]]:
    """What each rank saw, by case, but for the last one, which the last case kills."""
    variables = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "SIRE_SIM_MEMORY": "128MiB"}
    arguments = [[sys.executable, str(PROGRAM), str(rank), str(size), str(folder), *cases] for rank in range(size)]
    with ExitStack() as started:
        ranks = [started.enter_context(running(each, env=variables, stdout=subprocess.PIPE)) for each in arguments]
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * (size - 1) + [-signal.SIGKILL], said
    return [json.loads(each.splitlines()[-1]) for each in said[:-1]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One job for all, because PyTorch takes seconds to start four times."""
    return run_job(tmp_path_factory.mktemp("job"), SIZE, *CASES)


def of(job: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    return [seen[case] for seen in job]


def undone(seen: dict[str, Any]) -> bool:
    """Everything is as before the call, content without a backup included."""
    return bool(seen["weights"] and seen["cache"])


def test_all_ranks_pause_and_resume(job: list[dict[str, Any]]) -> None:
    for seen in of(job, "round_trip"):
        assert seen["paused"]["changed"] == seen["resumed"]["changed"] == 2
        assert seen["paused"]["moved"] == seen["resumed"]["moved"] >= 8 * MIB
        assert seen["given"] >= 8 * MIB, "the memory was the driver's meanwhile"
        assert seen["again"]["changed"] == 0
        assert seen["weights"]


@pytest.mark.parametrize("case", ["fault_at_prepare", "another_call"])
def test_one_ranks_failure_undoes_all(job: list[dict[str, Any]], case: str) -> None:
    for seen in of(job, case):
        assert undone(seen)
        assert seen["error"] == "RankError"
    messages = {seen["message"] for seen in of(job, case)}
    assert len(messages) == 1, "all ranks raise the same"


def test_the_error_says_which_rank_and_why(job: list[dict[str, Any]]) -> None:
    for seen in of(job, "fault_at_prepare"):
        assert seen["rank"] == LAST
        assert seen["status"] == sire.BusyError.status
        assert "leave the region first" in seen["reason"]
        assert "because of rank 3: BusyError" in seen["message"]
    for seen in of(job, "another_call"):
        assert "called resume('model')" in seen["reason"] or "called pause('model')" in seen["reason"]


def test_a_resume_that_fails_somewhere_leaves_all_paused(job: list[dict[str, Any]]) -> None:
    for seen in of(job, "fault_at_resume"):
        assert seen["rank"] == LAST
        assert seen["status"] == sire.OutOfMemoryError.status
        assert seen["while"] == {"model/weights": "paused", "model/cache": "resident"}
        assert seen["resumed"]["changed"] == 1, "the call can be repeated"
        assert undone(seen)


def test_a_group_of_some_ranks(job: list[dict[str, Any]]) -> None:
    first, *inside = of(job, "a_group")
    assert first["error"] in ("InvalidArgumentError", "ValueError")
    assert [seen["paused"]["changed"] for seen in inside] == [seen["resumed"]["changed"] for seen in inside] == [1, 1]
    assert all(undone(seen) for seen in inside)


def test_what_was_paused_before_stays_so(job: list[dict[str, Any]]) -> None:
    for seen in of(job, "partly_paused"):
        assert seen["rank"] == 0
        assert seen["between"] == {"model/weights": "paused", "model/cache": "resident"}
        assert undone(seen)


def test_an_undo_touches_nothing_under_a_tag_that_had_another_state() -> None:
    with sire.region("undo", backup="cpu"):
        weights = torch.full((MIB,), 3.0, device="cuda")
    with sire.region("undo/cache"):
        cache = torch.zeros(MIB, device="cuda")
    error = sire.RankError("another rank had no room", 1, "no room")

    # A resume that comes to nothing: the cache, which nobody backs up, was there before.
    sire.pause("undo")
    sire.resume("undo/cache")
    cache.fill_(7)
    before = _ranks._states("undo")
    sire.resume("undo")
    assert _ranks._undo(before, "undo", error) is error
    assert _ranks._states("undo") == before == {"undo": "paused", "undo/cache": "resident"}
    assert bool((cache == 7).all())

    # A pause that comes to nothing: the cache was away before, and nobody asks for room for it.
    sire.resume("undo")
    sire.pause("undo/cache")
    before = _ranks._states("undo")
    sire.pause("undo", release="lazy")
    assert _ranks._undo(before, "undo", error) is error
    assert _ranks._states("undo") == before == {"undo": "resident", "undo/cache": "paused"}
    assert bool((weights == 3).all())
    sire.resume("undo")


def test_a_killed_rank_undoes_the_others(job: list[dict[str, Any]]) -> None:
    for seen in of(job, "killed"):
        assert seen["rank"] == LAST
        assert "did not answer within 6 seconds" in seen["reason"]
        assert 2 <= seen["seconds"] < 120
        assert undone(seen)


def test_a_rank_that_dies_after_its_vote_undoes_what_the_others_have_committed(tmp_path: Path) -> None:
    [seen] = of(run_job(tmp_path, 2, "killed_after_its_vote"), "killed_after_its_vote")
    paused, resident = ({"model/weights": state, "model/cache": state} for state in ("paused", "resident"))
    assert seen["committed"] == paused
    assert seen["given"] >= 8 * MIB, "the memory was the driver's meanwhile"
    assert (seen["error"], seen["rank"]) == ("RankError", 1)
    assert "did not answer within 1 seconds" in seen["reason"]
    assert seen["weights"], "what has a backup is as before the call"
    assert (seen["states"], seen["alone"]) == (resident, paused), "and the rank goes on"


def ballots(timeout: float = 0.2, store: Any = None) -> list[Ballot]:
    """Two ranks' next calls, in one process."""
    store = dist.HashStore() if store is None else store
    return [Ballot(Members(store, "two", rank, 2), timeout) for rank in range(2)]


def test_who_comes_late_follows_the_verdict() -> None:
    early, late = ballots()
    verdict = early.round("called", "pause('a')", None)
    assert verdict is not None
    assert (verdict.rank, verdict.reason) == (1, "it did not answer within 0.2 seconds; is it alive?")
    assert late.round("called", "pause('a')", None) == verdict, "though by now both have answered"


def together(
    ballots: list[Ballot], name: str, failures: Sequence[Failure | None] = (None, None)
) -> list[Failure | None]:
    """One round of all; the verdicts."""
    with ThreadPoolExecutor(len(ballots)) as ranks:
        votes = zip(ballots, failures, strict=True)
        rounds = [ranks.submit(ballot.round, name, "pause('a')", failure) for ballot, failure in votes]
        return [each.result(60) for each in rounds]


INTERRUPT = Failure(1, "KeyboardInterrupt: ")


@pytest.mark.parametrize("decided", [0, 1, 2])
def test_who_withdraws_is_not_waited_for(decided: int) -> None:
    one, other = ballots(60)
    rounds = ("called", "prepared", "committed")
    for name in rounds[:decided]:
        assert together([one, other], name) == [None, None]
    assert other.withdraw(INTERRUPT) == INTERRUPT
    assert one.round(rounds[decided], "pause('a')", None) == INTERRUPT


def test_nobody_withdraws_from_what_all_have_committed() -> None:
    one, other = ballots(60)
    for name in ("called", "prepared", "committed"):
        assert together([one, other], name) == [None, None]
    assert other.withdraw(INTERRUPT) is None
    assert one.withdraw(INTERRUPT) is None


def test_a_failure_that_was_voted_counts_for_all() -> None:
    failure = Failure(1, "no room", 3)
    one, other = ballots(60)
    assert together([one, other], "called") == [None, None]
    assert together([one, other], "prepared", [None, failure]) == [failure, failure]
    assert one.withdraw(INTERRUPT) == failure


def test_keys_of_earlier_calls_do_not_stay_in_the_store() -> None:
    store, sizes = dist.HashStore(), []
    for number in range(6):
        now = ballots(60 if number != 3 else 0.1, store)
        if number == 3:
            # A call that only one rank makes leaves its keys until a later one succeeds.
            assert now[0].round("called", "pause('a')", None) is not None
            continue
        for name in ("called", "prepared", "committed"):
            assert together(now, name) == [None, None]
        sizes.append(store.num_keys())
    # Besides, one that counts each rank's series, and one that says that the first has begun.
    assert set(sizes) == {3 * 3 + 3}, sizes


def begun_anew(base: Any) -> Any:
    """The store of the next process group: another object, the same prefix, and the keys of the one before."""
    return dist.PrefixStore("default_pg", base)


def test_a_process_group_that_begins_anew_over_a_store_finds_no_votes_of_the_one_before() -> None:
    base = dist.HashStore()
    first = ballots(60, begun_anew(base))
    for name in ("called", "prepared", "committed"):
        assert together(first, name) == [None, None]
    alone, _absent = ballots(0.2, begun_anew(base))
    verdict = alone.round("called", "pause('a')", None)
    assert verdict is not None, "nobody else has called"
    assert (verdict.rank, verdict.reason) == (1, "it did not answer within 0.2 seconds; is it alive?")
    failure = Failure(0, "no room", 3)
    voted = ballots(60, begun_anew(base))
    assert together(voted, "called") == [None, None]
    assert together(voted, "prepared", [failure, None]) == [failure, failure], "its verdict is not the one before's"


def test_a_rank_that_has_missed_a_process_group_fails_and_then_follows_the_others() -> None:
    base = dist.HashStore()
    before, after, its = (begun_anew(base) for _ in range(3))
    missed = Ballot(Members(before, "two", 0, 2), 0.1).round("called", "pause('a')", None)
    assert missed is not None
    # It cannot know that this is over: its call is the one that the other waited for.
    behind = Ballot(Members(its, "two", 1, 2), 0.1)
    assert behind.round("called", "pause('a')", None) == missed
    ahead = Ballot(Members(after, "two", 0, 2), 60)
    behind = Ballot(Members(its, "two", 1, 2), 60)
    for name in ("called", "prepared", "committed"):
        assert together([ahead, behind], name) == [None, None]


def test_a_rank_whose_store_object_is_new_is_followed_by_the_others() -> None:
    base = dist.HashStore()
    stays = begun_anew(base)
    for new in (stays, begun_anew(base), begun_anew(base)):
        now = [Ballot(Members(new, "two", 0, 2), 60), Ballot(Members(stays, "two", 1, 2), 60)]
        for name in ("called", "prepared", "committed"):
            assert together(now, name) == [None, None]


@pytest.mark.parametrize(("at", "state"), [("called", "resident"), ("prepared", "resident"), ("committed", "paused")])
def test_ctrl_c_after_a_round_keeps_to_what_was_decided(
    tag: str, monkeypatch: pytest.MonkeyPatch, at: str, state: str
) -> None:
    class Interrupted(Ballot):
        def round(self, name: str, word: str, failure: Failure | None) -> Failure | None:
            verdict = super().round(name, word, failure)
            if name == at:
                signal.raise_signal(signal.SIGINT)
            return verdict

    store = dist.HashStore()
    monkeypatch.setattr(_ranks, "_ballot", lambda _group, _timeout: (Interrupted(Members(store, "one", 0, 1), 60), 0))
    with sire.region(tag, backup="cpu"):
        tensor = torch.full((MIB,), 7, dtype=torch.uint8, device="cuda")
    with pytest.raises(KeyboardInterrupt):
        sire.distributed.pause(tag)
    assert {each["state"] for each in sire.stats()["regions"] if each["tag"] == tag} == {state}
    sire.resume(tag)
    assert bool((tensor == 7).all())


def test_without_a_process_group_it_is_refused() -> None:
    assert not dist.is_initialized()
    with pytest.raises(sire.UnsupportedError, match="init_process_group"):
        sire.distributed.pause("model")
    with pytest.raises(sire.UnsupportedError, match="init_process_group"):
        sire.distributed.suspend_nccl()
    with pytest.raises(sire.InvalidArgumentError, match="timeout"):
        sire.distributed.resume("model", timeout=0)
