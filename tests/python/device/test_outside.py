"""What touches memory from outside: owners' callbacks, handles for other processes, dummies behind paused addresses."""

from __future__ import annotations

import multiprocessing.reduction
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import sire
import torch
from measure import MIB
from sire import _registration
from sire.distributed import _nccl
from torch import distributed
from torch.distributed import distributed_c10d
from torch.multiprocessing import reductions


@pytest.fixture
def owner(tag: str) -> Iterator[Owner]:
    owner = Owner(tag)
    yield owner
    owner.remove()


class Owner:
    """Somebody who has handed memory of a tag out, and writes down what it is told."""

    def __init__(self, tag: str) -> None:
        self.told: list[tuple[str, str | None]] = []
        self.refuses = False
        self.callbacks = [sire.before_pause(self.before, tag=tag), sire.after_resume(self.after, tag=tag)]

    def before(self, tag: str | None) -> None:
        self.told.append(("before", tag))
        if self.refuses:
            raise ValueError("a transfer is under way")

    def after(self, tag: str | None) -> None:
        self.told.append(("after", tag))

    def remove(self) -> None:
        for callback in self.callbacks:
            callback.remove()


def make(tag: str) -> torch.Tensor:
    with sire.region(tag, backup="cpu"):
        return torch.full((MIB,), 7.0, device="cuda")


def test_owners_are_told_in_time(tag: str, owner: Owner) -> None:
    tensor = make(tag)
    states: list[str] = []
    other = [sire.before_pause(lambda _: states.append(region_state(tag)), tag=tag)]
    other.append(sire.after_resume(lambda _: states.append(region_state(tag)), tag=tag))
    with sire.paused(tag):
        assert states == ["resident"], "before the pause, not after it"
        sire.pause(tag)
    assert owner.told == [("before", tag), ("after", tag)], "a pause of what is paused tells nobody"
    assert states == ["resident", "resident"], "after the resume"
    sire.pause()
    sire.resume()
    assert owner.told[2:] == [("before", None), ("after", None)]
    for callback in other:
        callback.remove()
        callback.remove()
    owner.remove()
    with sire.paused(f"{tag}"):
        pass
    assert len(owner.told) == 4
    assert bool((tensor == 7).all())


def region_state(tag: str) -> str:
    return next(each["state"] for each in sire.stats()["regions"] if each["tag"] == tag)


def test_an_owner_that_refuses_stops_the_pause(tag: str, owner: Owner) -> None:
    tensor = make(tag)
    late = Owner(tag)
    late.refuses = True
    with pytest.raises(ValueError, match="a transfer is under way"):
        sire.pause(tag)
    assert region_state(tag) == "resident"
    assert owner.told == late.told == [("before", tag), ("after", tag)], "who had let go may take hold again"
    late.remove()
    assert bool((tensor == 7).all())


def test_a_pause_that_fails_gives_the_memory_back_to_its_owners(tag: str, owner: Owner) -> None:
    make(tag)
    with sire.region(tag, backup="cpu"), pytest.raises(sire.BusyError):
        sire.pause(tag)
    assert owner.told == [("before", tag), ("after", tag)]


def test_all_are_told_though_one_fails(tag: str, owner: Owner) -> None:
    tensor = make(tag)

    def fails(_tag: str | None) -> None:
        raise ValueError("cannot register again")

    callback = sire.after_resume(fails)
    sire.pause(tag)
    with pytest.raises(ValueError, match="cannot register again"):
        sire.resume(tag)
    assert owner.told[-1] == ("after", tag)
    assert bool((tensor == 7).all()), "the memory is there all the same"
    callback.remove()


def test_callbacks_know_the_tree_of_tags(tag: str, owner: Owner) -> None:
    make(f"{tag}/below")
    with sire.region(f"{tag}-beside"):
        beside = torch.ones(MIB, device="cuda")
    with sire.paused(f"{tag}-beside"):
        assert owner.told == []
    with sire.paused(f"{tag}/below"):
        assert owner.told == [("before", f"{tag}/below")]
    assert beside.shape == (MIB,)
    with pytest.raises(sire.InvalidArgumentError, match="function of a tag"):
        sire.before_pause(None)  # type: ignore[arg-type]


def test_switch_and_background_resumes_tell_owners(tag: str, owner: Owner) -> None:
    make(f"{tag}/a")
    make(f"{tag}/b")
    sire.pause(f"{tag}/b")
    sire.switch(pause=f"{tag}/a", resume=f"{tag}/b")
    assert owner.told == [("before", f"{tag}/b"), ("before", f"{tag}/a"), ("after", f"{tag}/b")]
    progress = sire.resume(f"{tag}/a", non_blocking=True)
    assert progress.wait()
    assert progress.wait()
    assert owner.told[3:] == [("after", f"{tag}/a")]


def test_who_enters_a_paused_region_and_resumes_it_tells_owners(tag: str, owner: Owner) -> None:
    """Nobody was told: a collective library stayed suspended."""
    make(tag)
    sire.pause(tag)
    again = sire.region(tag, backup="cpu", on_paused="resume")
    owner.told.clear()
    with again:
        assert owner.told == [("after", tag)]
    with again:
        assert owner.told == [("after", tag)], "it was there"

    def fail(_: str | None) -> None:
        raise ValueError("cannot take hold again")

    callback = sire.after_resume(fail, tag=tag)
    sire.pause(tag)
    with pytest.raises(ValueError, match="take hold"), again:
        pytest.fail("entered")
    callback.remove()
    assert region_state(tag) == "resident"
    assert sire.pause(tag).changed, "the thread is not inside"


class Backend:
    """A stand-in for a NCCL backend."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def suspend(self) -> None:
        self.called.append("suspend")

    def resume(self) -> None:
        self.called.append("resume")


def test_nccl_goes_along(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tag)
    backend = Backend()
    monkeypatch.setattr(_nccl, "_backend", lambda _group: backend)
    suspension = sire.distributed.suspend_nccl(tag=tag)
    with sire.paused(tag):
        assert backend.called == ["suspend"]
        assert suspension.suspended
    with sire.region(tag, backup="cpu"), pytest.raises(sire.BusyError):
        sire.pause(tag)
    assert backend.called == ["suspend", "resume"] * 2, "a pause that failed has resumed it"
    sire.pause(tag)
    suspension.remove()
    assert backend.called == ["suspend", "resume"] * 3
    sire.resume(tag)
    assert len(backend.called) == 6
    monkeypatch.setattr(_nccl, "_backend", lambda _group: object())
    with pytest.raises(sire.UnsupportedError, match="cannot be suspended"):
        sire.distributed.suspend_nccl()


def test_a_tensor_of_a_region_is_not_sent_to_another_process_and_it_is_said_why(tag: str) -> None:
    tensor = make(tag)
    with pytest.raises(sire.UnsupportedError, match=f"tensor of region '{tag}' cannot be sent to another process"):
        reductions.reduce_tensor(tensor)
    with pytest.raises(sire.UnsupportedError, match="made outside regions"):
        multiprocessing.reduction.ForkingPickler.dumps(tensor[5:])
    assert multiprocessing.reduction.ForkingPickler.dumps(tensor.cpu())
    assert bool((tensor == 7).all())


def test_what_stays_is_said_before_the_pause(tag: str) -> None:
    with sire.region(f"{tag}/stays", backup="cpu"):
        stays = torch.ones(4 * MIB, device="cuda")
    with sire.region(f"{tag}/goes", backup="cpu"):
        goes = torch.ones(4 * MIB, device="cuda")
    assert sire.held(tag) == {}
    sire.keep_resident(stays)
    held = sire.held(tag)
    assert list(held) == ["the program keeps it resident"]
    assert held.items() <= sire.held().items()
    with pytest.raises(sire.UnsupportedError, match="because the program keeps it resident"):
        sire.pause(tag, held="refuse")
    assert region_state(f"{tag}/goes") == "resident"
    report = sire.pause(f"{tag}/stays")
    assert "nothing moved, " in str(report)
    sire.resume(f"{tag}/stays")
    report = sire.pause(tag)
    assert report.bytes_held == held["the program keeps it resident"] >= 16 * MIB
    assert "held on the device" in str(report)
    assert float(stays.sum()) == 4 * MIB
    sire.resume(tag)
    assert float(goes.sum()) == 4 * MIB
    with pytest.raises(sire.InvalidArgumentError, match="'leave' or 'refuse'"):
        sire.pause(tag, held="maybe")  # type: ignore[arg-type]


DUMMY = """
import sire, torch
with sire.region("cache"):
    cache = torch.ones(8 << 20, device="cuda")
with sire.region("weights", backup="cpu"):
    weights = torch.ones(1 << 20, device="cuda")
torch.cuda.synchronize()
free = torch.cuda.mem_get_info()[0]
sire.pause()
given = torch.cuda.mem_get_info()[0] - free
junk = (cache + 1).sum()
cache.fill_(3)
torch.cuda.synchronize()
print("lives", given >= 34 << 20, sire.stats()["dummies"]["veiled_bytes"] >= 32 << 20)
sire.resume()
print(sire.stats()["dummies"], bool((weights == 1).all()))
"""


def test_strays_into_discarded_memory_leave_the_context_alive() -> None:
    variables = os.environ | {"SIRE_DUMMY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DUMMY], env=variables, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.splitlines() == ["lives True True", "{'bytes': 0, 'strays': 1, 'veiled_bytes': 0} True"], (
        done.stderr
    )
    assert "something wrote to paused memory on device 0" in done.stderr


READING = """
import sire, torch
with sire.region("cache"):
    cache = torch.ones(8 << 20, device="cuda")
torch.cuda.synchronize()
sire.pause("cache")
junk = float((cache * 2).sum())
torch.cuda.synchronize()
print("lives", float(torch.ones(8, device="cuda").sum()), sire.stats()["dummies"]["veiled_bytes"] >= 32 << 20)
sire.resume("cache")
print(sire.stats()["dummies"])
"""


def test_a_stray_read_leaves_the_context_alive_and_is_not_seen() -> None:
    """Only what was written can be found afterwards: the dummy is as it was."""
    variables = os.environ | {"SIRE_DUMMY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READING], env=variables, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.splitlines() == ["lives 8.0 True", "{'bytes': 0, 'strays': 0, 'veiled_bytes': 0}"], done.stderr
    assert "something wrote" not in done.stderr


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_nccl_does_not_register_what_graphs_use(
    tag: str, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", before or "")
    if before is None:
        monkeypatch.delenv("NCCL_GRAPH_REGISTER")
    monkeypatch.setattr(_registration, "_prepared", False)
    make(tag)
    assert os.environ["NCCL_GRAPH_REGISTER"] == after
    assert sire.pause(tag).notes == (), "no communicator, nothing to say"


def test_it_is_said_that_nccl_registers(monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    make(tag)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")
    monkeypatch.setattr(_registration, "has_communicators", lambda: True)
    [note] = sire.pause(tag).notes
    assert note.startswith("NCCL_GRAPH_REGISTER is 1")
    assert sire.resume(tag).notes == ()
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    monkeypatch.setattr(_registration, "_too_late", True)
    [note] = sire.pause(tag).notes
    assert note.startswith("NCCL_GRAPH_REGISTER was set after NCCL had started")
    sire.resume(tag)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[distributed.ProcessGroup]:
    """The process group of a job that is this process alone, with gloo."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize(("backend", "found"), [("gloo", False), ("nccl", True), ("cpu:gloo,cuda:nccl", True)])
def test_a_process_group_with_nccl_is_found(
    tag: str, group: distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch, backend: str, found: bool
) -> None:
    """There is no NCCL here, so a group of gloo's is given the name that one of NCCL's has in PyTorch's own list."""
    make(tag)
    groups = distributed_c10d._world.pg_map
    named, store = groups[group]
    assert named == "gloo"
    with monkeypatch.context() as patched:
        patched.setitem(groups, group, (backend, store))
        assert _registration.has_communicators() is found
        patched.setenv("NCCL_GRAPH_REGISTER", "1")
        assert [note.partition(":")[0] for note in sire.pause(tag).notes] == ["NCCL_GRAPH_REGISTER is 1"] * found
        sire.resume(tag)
        patched.delenv("NCCL_GRAPH_REGISTER")
        patched.setattr(_registration, "_prepared", False)
        patched.setattr(_registration, "_too_late", False)
        make(tag)
        assert os.environ["NCCL_GRAPH_REGISTER"] == "0"
        why = "NCCL_GRAPH_REGISTER was set after NCCL had started"
        assert [note.partition(":")[0] for note in sire.pause(tag).notes] == [why] * found
        sire.resume(tag)
    assert not _registration.has_communicators()
