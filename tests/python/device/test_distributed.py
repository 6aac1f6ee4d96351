"""`sire.distributed`: four processes with gloo on the device, a fault in one of them, a killed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sire
import torch.distributed as dist
from running import running
from sire.distributed._ballot import Ballot, Failure, Members

PROGRAM = Path(__file__).resolve().with_name("rank_program.py")
SIZE, LAST = 4, 3
MIB = 1 << 20
CASES = ("round_trip", "fault_at_prepare", "fault_at_resume", "another_call", "a_group", "partly_paused", "killed")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, by case; one job for all, because PyTorch takes seconds to start four times."""
    folder = tmp_path_factory.mktemp("job")
    variables = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "SIRE_SIM_MEMORY": "128MiB"}
    arguments = [[sys.executable, str(PROGRAM), str(rank), str(SIZE), str(folder), *CASES] for rank in range(SIZE)]
    with ExitStack() as started:
        ranks = [started.enter_context(running(each, env=variables, stdout=subprocess.PIPE)) for each in arguments]
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * LAST + [-signal.SIGKILL], said
    return [json.loads(each.splitlines()[-1]) for each in said[:LAST]]


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


def test_a_killed_rank_undoes_the_others(job: list[dict[str, Any]]) -> None:
    for seen in of(job, "killed"):
        assert seen["rank"] == LAST
        assert "did not answer within 6 seconds" in seen["reason"]
        assert 2 <= seen["seconds"] < 120
        assert undone(seen)


def ballots() -> list[Ballot]:
    """Two ranks' next calls, in one process."""
    store = dist.HashStore()
    return [Ballot(Members(store, "two", rank, 2), 0.2) for rank in range(2)]


def test_who_comes_late_follows_the_verdict() -> None:
    early, late = ballots()
    verdict = early.round("called", "pause('a')", None)
    assert verdict is not None
    assert (verdict.rank, verdict.reason) == (1, "it did not answer within 0.2 seconds; is it alive?")
    assert late.round("called", "pause('a')", None) == verdict, "though by now both have answered"


def test_who_withdraws_is_not_waited_for() -> None:
    one, other = ballots()
    other.round("prepared", "pause('a')", Failure(1, "no room", 3))
    assert one.round("prepared", "pause('a')", None) == Failure(1, "no room", 3)
    other.withdraw(Failure(1, "KeyboardInterrupt: "))
    assert one.round("committed", "pause('a')", None) == Failure(1, "KeyboardInterrupt: ")


def test_without_a_process_group_it_is_refused() -> None:
    assert not dist.is_initialized()
    with pytest.raises(sire.UnsupportedError, match="init_process_group"):
        sire.distributed.pause("model")
    with pytest.raises(sire.UnsupportedError, match="init_process_group"):
        sire.distributed.suspend_nccl()
    with pytest.raises(sire.InvalidArgumentError, match="timeout"):
        sire.distributed.resume("model", timeout=0)
