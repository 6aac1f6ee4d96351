"""Preemption by agreement: who needs memory gets what others marked, they get it back, nothing of it is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from containers import container
from running import end, line, running, until

PROGRAM = Path(__file__).with_name("preempt_program.py")
# Of 96 MiB: two of them do not fit.
LARGE = 56
# Seconds.
OLD = 60.0


class Agent:
    """A process of the program, and what is said to it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.has_filled = False
        self._begun = time.monotonic()

    def is_old(self) -> bool:
        """Whether its time limit, which counts from its start, could end it in the next test."""
        return time.monotonic() - self._begun > OLD

    def tell(self, do: str, **arguments: Any) -> None:
        self.has_filled |= do == "fill"
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        said = line(self.process)
        assert said, "it has ended"
        return json.loads(said)

    def ask(self, do: str, **arguments: Any) -> Any:
        self.tell(do, **arguments)
        return self.hear()

    def refused(self, why: str, **arguments: Any) -> None:
        """It wants memory in vain, and hears why; on a busy machine its time may be over before others are asked."""

        def said() -> bool:
            answer = self.ask("wants", timeout=0.5, **arguments)
            assert "Nobody gave way" in answer
            return why in answer

        until(f"it hears: {why}", said)


Start = Callable[..., list[Agent]]


class Pool:
    """Agents on a device of their own. Who never had a region serves the next test: PyTorch keeps regions' pools."""

    def __init__(self, place: Path, stack: contextlib.ExitStack, **more: str) -> None:
        place.chmod(0o700)
        self.place = place
        self.environment = {
            **os.environ,
            "SIRE_SIM_DIR": str(place),
            "SIRE_SIM_MEMORY": "96MiB",
            "TORCHTOOLS_LOCK_DIR": str(place),
            "XDG_RUNTIME_DIR": str(place),
            **more,
        }
        self._stack = stack
        self._idle: list[Agent] = []
        self._busy: list[Agent] = []

    def start(self, count: int, within: Sequence[str] = (), **more: str) -> list[Agent]:
        command, pipes = [*within, sys.executable, str(PROGRAM)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment: dict[str, str] = {**self.environment, **more}
        fresh: list[Agent] = []
        while len(fresh) < (count if within else bool(more)) or len(self._idle) + len(fresh) < count:
            process = self._stack.enter_context(running(command, env=environment, **pipes))  # type: ignore[arg-type]
            fresh.append(Agent(process))
        assert [agent.hear() for agent in fresh] == ["ready"] * len(fresh)
        # Owners come first in each test, and needers, which can be used again, last.
        agents = [*fresh, *self._idle]
        self._busy, self._idle = agents[:count], agents[count:]
        return self._busy

    def asked(self, agent: Agent, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """What it answers to whoever asks from outside, also while it waits: what it has, if nothing else was asked."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(self.place / "sire" / f"{agent.process.pid}.sock"))
            client.sendall(json.dumps(request or {"verb": "list"}).encode() + b"\n")
            with client.makefile("rb") as replies:
                found: dict[str, Any] = json.loads(replies.readline())["ok"]
        return found

    def state(self, agent: Agent, tag: str) -> str:
        """Of a region of it, also while it waits."""
        return next(str(each["state"]) for each in self.asked(agent)["stats"]["regions"] if each["tag"] == tag)

    def reset(self) -> None:
        """Ends the others. A test that skips has started none, and those of the one before are idle already."""
        busy, self._busy = self._busy, []
        for agent in busy:
            if agent.has_filled or agent.is_old() or agent.process.poll() is not None:
                end(agent.process)
            else:
                assert agent.ask("done") == "done"
                self._idle.append(agent)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with contextlib.ExitStack() as stack:
        yield Pool(tmp_path_factory.mktemp("preemption"), stack)


@pytest.fixture
def start(pool: Pool) -> Iterator[Start]:
    """So many agents that have nothing."""
    yield pool.start
    pool.reset()


def test_memory_gives_way_by_the_owners_terms_and_comes_back_with_its_content(start: Start) -> None:
    owner, needer = start(2)
    owner.ask("fill", tag="cache", mib=LARGE)
    needer.refused("no other process of this user offers memory", mib=LARGE)
    assert owner.ask("mark", tag="cache", priority=1, after_idle=1800) == "marked"
    # The clock is the program's: it says when it used what.
    owner.ask("used", tag="cache", ago=0)
    needer.refused(f"{owner.process.pid}'s 'cache': its priority is 1, the need's is 0", mib=LARGE, priority=0)
    needer.refused("s of the 1800.0 s that its owner wants", mib=LARGE, priority=1)
    assert owner.ask("state", tag="cache") == "resident"
    owner.ask("used", tag="cache", ago=3600)
    figures = owner.ask("figures", tag="cache")
    assert figures["idle_seconds"] >= 3600
    assert figures["state"] == "resident"
    assert sum(each["bytes"] for each in figures["gpus"]) >= LARGE << 20
    assert needer.ask("wants", mib=LARGE, priority=1) == "has"
    # Until the needer is done the owner waits in its safe point, and answers nothing.
    owner.tell("check", tag="cache")
    assert needer.ask("done") == "done"
    assert owner.hear() is True
    # Who came back just now goes again if nobody else is left, by its terms: it was used just now.
    needer.refused("idle for", mib=LARGE, priority=1)
    assert owner.ask("unmark", tag="cache") == "unmarked"
    needer.refused("offers memory there", mib=LARGE, priority=1)


def test_only_what_gave_way_comes_back_and_the_owners_own_word_wins(start: Start) -> None:
    owner, needer = start(2)
    owner.ask("fill", tag="m/own", mib=8)
    # Away before the rest comes: an expandable segment takes 20 MiB for it.
    owner.ask("pause", tag="m/own")
    for tag, mib in (("m/large", LARGE), ("kept", 8)):
        owner.ask("fill", tag=tag, mib=mib)
    owner.ask("mark", tag="m", wait=False)
    assert needer.ask("wants", mib=LARGE) == "has"
    # It goes on without it.
    assert [owner.ask("state", tag=tag) for tag in ("m/own", "m/large", "kept")] == ["paused", "paused", "resident"]
    assert owner.ask("check", tag="kept") is True
    assert needer.ask("done") == "done"
    until("it is back", lambda: owner.ask("state", tag="m/large") == "resident")
    assert owner.ask("check", tag="m/large") is True
    assert owner.ask("state", tag="m/own") == "paused"
    # What the program resumes and pauses itself is its own affair from then on. An expandable segment takes 20 MiB at
    # once, and a pause gives them so: who waits for 32 MiB but takes 40 can come too early.
    assert needer.ask("wants", mib=40) == "has"
    assert owner.ask("state", tag="m/large") == "paused"
    assert needer.ask("done") == "done"
    until("it is back again", lambda: owner.ask("state", tag="m/large") == "resident")
    owner.ask("unmark", tag="m")
    owner.ask("mark", tag="m", resume=False)
    assert needer.ask("wants", mib=LARGE) == "has"
    assert needer.ask("done") == "done"
    assert owner.ask("state", tag="m/large") == "paused", "nobody asked for its resume"
    owner.ask("resume", tag="m/large")
    assert owner.ask("check", tag="m/large") is True


def test_what_would_be_lost_does_not_give_way_unless_that_is_said(start: Start) -> None:
    owner, needer = start(2)
    owner.ask("fill", tag="scratch", mib=LARGE, backup=None)
    owner.ask("mark", tag="scratch")
    needer.refused("keeps no backup", mib=LARGE)
    assert owner.ask("check", tag="scratch") is True
    owner.ask("unmark", tag="scratch")
    owner.ask("mark", tag="scratch", discard=True)
    assert needer.ask("wants", mib=LARGE) == "has"


@pytest.mark.parametrize(
    ("how", "why"),
    # The only mark: with it the socket is closed.
    [("unmark", "cannot bring back region 'cache'"), ("unmark_in_a_capture", "captur")],
    ids=["no-room", "in-a-capture"],
)
def test_what_cannot_come_back_when_the_consent_is_taken_back_comes_later(start: Start, how: str, why: str) -> None:
    owner, needer = start(2)
    owner.ask("fill", tag="cache", mib=LARGE)
    owner.ask("mark", tag="cache", wait=False)
    assert needer.ask("wants", mib=LARGE) == "has"
    assert why in owner.ask(how, tag="cache")
    assert owner.ask("state", tag="cache") == "paused"
    assert needer.ask("done") == "done"
    until("it is back", lambda: owner.ask("state", tag="cache") == "resident")
    assert owner.ask("check", tag="cache") is True


def test_a_needer_that_is_killed_leaves_nothing_behind(start: Start) -> None:
    owner, needer = start(2)
    owner.ask("fill", tag="cache", mib=LARGE)
    owner.ask("mark", tag="cache")
    assert needer.ask("wants", mib=LARGE) == "has"
    owner.tell("check", tag="cache")
    needer.process.kill()
    needer.process.wait(60)
    assert owner.hear() is True


def test_an_owner_that_is_stopped_is_passed_by_and_one_that_is_killed_gives_everything(start: Start) -> None:
    stopped, other, needer = start(3)
    stopped.ask("fill", tag="a", mib=32)
    other.ask("fill", tag="b", mib=40)
    stopped.ask("mark", tag="a")
    # Dearer, so that the first one would be asked if it answered.
    other.ask("mark", tag="b", priority=1)
    stopped.process.send_signal(signal.SIGSTOP)
    try:
        assert needer.ask("wants", mib=40, priority=1) == "has"
        assert needer.ask("done") == "done"
        assert other.ask("check", tag="b") is True
        stopped.process.kill()
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    stopped.process.wait(60)
    # Now there is room without anybody's help.
    assert needer.ask("wants", mib=40, priority=0) == "has"
    assert other.ask("check", tag="b") is True


def test_two_that_need_each_others_memory_are_both_served_and_nobody_waits_for_ever(start: Start) -> None:
    one, other, third = start(3)
    one.ask("fill", tag="one", mib=40)
    other.ask("fill", tag="other", mib=40)
    one.ask("mark", tag="one")
    other.ask("mark", tag="other")
    # Each waits outside of its safe points, so neither gives way while it waits.
    # Both have left theirs before either asks.
    one.tell("meet")
    other.tell("meet")
    assert [one.hear(), other.hear()] == ["here", "here"]
    one.tell("wants", mib=50, timeout=2)
    other.tell("wants", mib=50, timeout=2)
    said = [one.hear(), other.hear()]
    assert all(each == "has" or "could not be reserved" in each for each in said), said
    for agent in (one, other):
        agent.tell("done")
    assert [one.hear(), other.hear()] == ["done", "done"]
    assert one.ask("check", tag="one") is True
    assert other.ask("check", tag="other") is True
    # Both give way where one is not enough, and both come back.
    assert third.ask("wants", mib=80) == "has"
    assert third.ask("done") == "done"
    assert one.ask("check", tag="one") is True
    assert other.ask("check", tag="other") is True


def test_a_forbidden_socket_is_no_consent_and_nonsense_is_refused(start: Start, mode: str) -> None:
    if mode != "torch":
        pytest.skip("the process is the same in every mode")
    [owner] = start(1, SIRE_CONTROL="0")
    owner.ask("fill", tag="cache", mib=2)
    assert "SIRE_CONTROL forbids the control socket" in owner.ask("mark", tag="cache")
    assert "can not resume it" in owner.ask("mark", tag="cache", resume=False, wait=True)
    assert "after_idle is a number of seconds" in owner.ask("mark", tag="cache", after_idle=-1)
    assert "priority is a whole number" in owner.ask("mark", tag="cache", priority=0.5)


def test_a_need_on_one_device_takes_nothing_from_the_other(tmp_path_factory: pytest.TempPathFactory, mode: str) -> None:
    if mode != "torch":
        pytest.skip("the process is the same in every mode")
    with contextlib.ExitStack() as stack:
        pool = Pool(tmp_path_factory.mktemp("devices"), stack, SIRE_SIM_DEVICES="2")
        owner, needer = pool.start(2)
        for device, tag in enumerate(("zero", "one")):
            owner.ask("fill", tag=tag, mib=LARGE, device=device)
            owner.ask("mark", tag=tag, wait=False)
        states = lambda: [owner.ask("state", tag=tag) for tag in ("zero", "one")]  # noqa: E731
        # The other one has been idle for longer, and would be asked first if it helped.
        owner.ask("used", tag="zero", ago=3600)
        owner.ask("used", tag="one", ago=0)
        assert needer.ask("wants", mib=LARGE, device=1) == "has"
        assert states() == ["resident", "paused"]
        assert owner.ask("check", tag="zero") is True
        # Together they are more than one device has, and each has its own.
        assert needer.ask("wants", mib=LARGE, device=0) == "has"
        assert states() == ["paused", "paused"]
        assert needer.ask("done") == "done"
        until("both are back", lambda: states() == ["resident", "resident"])
        assert [owner.ask("check", tag=tag) for tag in ("zero", "one")] == [True, True]


def test_a_child_of_the_needer_holds_no_loan_whenever_it_was_forked(
    pool: Pool, start: Start, tmp_path: Path, mode: str
) -> None:
    if mode != "torch":
        pytest.skip("the process is the same in every mode")
    owner, needer = start(2)
    owner.ask("fill", tag="cache", mib=LARGE)
    owner.ask("mark", tag="cache", wait=False)
    over = tmp_path / "over"
    try:
        # While it waits: the owner passes no safe point before it was asked and the child is there. What the child may
        # hold is what it inherits; it has no need to close, since the parent is given its own when the wait is over.
        owner.ask("meet")
        needer.tell("wants", mib=LARGE, timeout=150)
        until("it has been asked", lambda: pool.asked(owner)["control"]["asked"] == 1)
        waiting, granted = tmp_path / "waiting", tmp_path / "granted"
        needer.tell("", at_once="fork", arguments={"closed": str(waiting), "until": str(over)})
        assert needer.hear() > 0
        until("the child is there", waiting.exists)
        assert owner.ask("state", tag="cache") == "resident"
        assert needer.hear() == "has"
        assert owner.ask("state", tag="cache") == "paused"
        assert needer.ask("done") == "done"
        until("it is back", lambda: owner.ask("state", tag="cache") == "resident")
        # After it was granted; and the parent is killed, not the child.
        assert needer.ask("wants", mib=LARGE) == "has"
        assert needer.ask("fork", closed=str(granted), until=str(over)) > 0
        until("the child has closed its need", granted.exists)
        assert owner.ask("state", tag="cache") == "paused"
        needer.process.kill()
        needer.process.wait(60)
        until("it is back again", lambda: owner.ask("state", tag="cache") == "resident")
        assert owner.ask("check", tag="cache") is True
    finally:
        over.touch()


def test_what_gave_way_comes_back_in_the_owners_turn(pool: Pool, start: Start, preloaded: bool) -> None:
    if not preloaded:
        pytest.skip("time slices need a hook mode in which everything is heard")
    owner, other, needer = start(3)
    assert owner.ask("turns", quantum=0.05) == "turn"
    owner.ask("fill", tag="cache", mib=40)
    owner.ask("fill", tag="kept", mib=8)
    owner.ask("mark", tag="cache", wait=False)
    # In its own turn it gives way as ever.
    assert needer.ask("wants", mib=LARGE) == "has"
    assert owner.ask("state", tag="cache") == "paused"
    assert owner.ask("check", tag="kept") is True
    # It makes way for another one's turn with what it has left; what it has lent stays lent.
    assert other.ask("turns", quantum=3600) == "turn"
    assert [pool.state(owner, tag) for tag in ("cache", "kept")] == ["paused", "paused"]
    # The need is over in that turn: the memory is the other one's until it leaves.
    assert needer.ask("done") == "done"
    other.has_filled = True
    until("the end of the need is heard", lambda: pool.asked(owner)["control"]["loans"][0]["state"] == "returning")
    assert [pool.state(owner, tag) for tag in ("cache", "kept")] == ["paused", "paused"]
    assert other.ask("no_turns") == "left"
    until("its turn has come", lambda: owner.ask("state", tag="cache") == "resident")
    assert [owner.ask("check", tag=tag) for tag in ("cache", "kept")] == [True, True]


def test_a_pause_from_outside_of_a_part_keeps_that_part(pool: Pool, start: Start) -> None:
    owner, needer = start(2)
    for tag, mib in (("m/a", 24), ("m/b", 32)):
        owner.ask("fill", tag=tag, mib=mib)
    owner.ask("mark", tag="m", wait=False)
    assert needer.ask("wants", mib=LARGE) == "has"
    assert pool.asked(owner, {"verb": "pause", "tag": "m/a", "timeout": 50})["paused"] == ["m/a"]
    assert needer.ask("done") == "done"
    until("the rest is back", lambda: pool.state(owner, "m/b") == "resident")
    obstacles = lambda: [loan["obstacle"] for loan in pool.asked(owner)["control"]["loans"]]  # noqa: E731
    held = "it was paused from outside meanwhile, and waits for its resume"
    # Written down when the resume is over, which is a moment after the memory is back.
    until("it is told why the part is not", lambda: obstacles() == [held])
    assert pool.state(owner, "m/a") == "paused"
    assert pool.asked(owner, {"verb": "resume", "tag": "m/a", "timeout": 50})["paused"] == []
    assert [owner.ask("check", tag=tag) for tag in ("m/a", "m/b")] == [True, True]
    assert pool.asked(owner)["control"]["loans"] == []


def test_processes_of_several_containers_with_one_number_are_told_apart(pool: Pool, start: Start, mode: str) -> None:
    if mode != "torch":
        pytest.skip("the process is the same in every mode")
    within = container()
    if within is None:
        pytest.skip("this machine lets nobody have a PID namespace, or has no unshare (util-linux)")
    cheap, dear, needer = pool.start(3, within)
    assert [agent.ask("number") for agent in (cheap, dear, needer)] == [1, 1, 1]
    cheap.ask("fill", tag="cheap", mib=32)
    dear.ask("fill", tag="dear", mib=32)
    cheap.ask("mark", tag="cheap", wait=False)
    dear.ask("mark", tag="dear", wait=False, priority=1)
    # The needer has the owners' number, too, and a mark of its own, which is no answer to its need.
    needer.ask("fill", tag="own", mib=12)
    needer.ask("mark", tag="own", wait=False)
    assert needer.ask("wants", mib=40, priority=1) == "has"
    states = lambda: [cheap.ask("state", tag="cheap"), dear.ask("state", tag="dear")]  # noqa: E731
    assert states() == ["paused", "resident"]
    assert needer.ask("done") == "done"
    until("it is back", lambda: states() == ["resident", "resident"])
    assert cheap.ask("check", tag="cheap") is True


def test_the_example_keeps_its_claims(pool: Pool, mode: str) -> None:
    if mode != "torch":
        pytest.skip("once is enough: the two sides are tested above in every mode")
    example = Path(__file__).resolve().parents[3] / "examples" / "preemption.py"
    ran = subprocess.run(
        [sys.executable, str(example), mode],
        env=pool.environment,
        cwd=example.parent,
        text=True,
        capture_output=True,
        check=False,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "the model is back, every byte as it was" in ran.stdout
