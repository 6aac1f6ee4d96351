"""Trainings that share a device by turns: each has 80 % of it, and computes to the bit what it computes alone."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sire
import slice_program
import torch
from outside import RefusedError, ask
from running import running
from sire import _library, torchtools
from sire._regions import make_policy

PROGRAM = Path(__file__).with_name("slice_program.py")
PATIENCE = 120
MIB = 1 << 20
# In MiB. Before PyTorch 2.15 each process keeps the rest of what it tried a workspace with, outside of its turns.
MEMORY = 32 if torch.__version__ >= (2, 15) else 36


class Job:
    """A process of the program; what it says, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._said: queue.Queue[str | None] = queue.Queue()
        self._complaints: queue.Queue[str | None] = queue.Queue()
        self.complaints: list[str] = []
        for stream, into in ((self.process.stdout, self._said), (self.process.stderr, self._complaints)):
            threading.Thread(target=self._listen, args=(stream, into), daemon=True).start()

    @staticmethod
    def _listen(stream: object, into: queue.Queue[str | None]) -> None:
        for line in stream:  # type: ignore[attr-defined]
            into.put(line.rstrip("\n"))
        into.put(None)

    def until(self, wanted: Callable[[list[str]], bool]) -> list[str]:
        """Reads on until a line is as wanted; its words."""
        while True:
            line = self._said.get(timeout=PATIENCE)
            assert line is not None, "it ended:\n" + self.complaint()
            self.lines.append(line)
            if wanted(line.split()):
                return line.split()

    def complains(self, text: str) -> None:
        """Reads its standard error until this was there."""
        while True:
            line = self._complaints.get(timeout=PATIENCE)
            assert line is not None, "\n".join(self.complaints)
            self.complaints.append(line)
            if text in line:
                return

    def complaint(self) -> str:
        """All of its standard error, when it has ended."""
        while (line := self._complaints.get(timeout=PATIENCE)) is not None:
            self.complaints.append(line)
        self._complaints.put(None)
        return "\n".join(self.complaints)

    def say(self) -> None:
        """The line that it waits for."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Reads on to its end; the exit status."""
        while (line := self._said.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return self.process.wait(PATIENCE)

    def losses(self) -> list[str]:
        return [line.split()[1] for line in self.lines if line.startswith("step ")]

    def switches(self) -> int:
        return max((int(line.split()[2]) for line in self.lines if line.startswith("step ")), default=0)


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts programs on a device of their own."""
    environment = {
        **os.environ,
        "SIRE_SIM_DIR": str(tmp_path),
        "SIRE_SIM_MEMORY": f"{MEMORY}MiB",
        "TORCHTOOLS_LOCK_DIR": str(tmp_path),
    }

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with contextlib.ExitStack() as jobs:

        def started(what: str, *arguments: object, **more: str) -> Job:
            command = [sys.executable, str(PROGRAM), what, *map(str, arguments)]
            hooks = ("LD_PRELOAD", "SIRE_HOOK_MODE") if what == "alone" else ()
            its = {name: value for name, value in environment.items() if name not in hooks} | more
            return Job(jobs.enter_context(running(command, env=its, **pipes)))

        yield started


@pytest.fixture
def heard(preloaded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Turns of this process, in a queue of the test's own."""
    if not preloaded:
        pytest.skip("time slices need a hook mode in which everything is heard")
    monkeypatch.setenv("TORCHTOOLS_LOCK_DIR", str(tmp_path))


def alone(seed: int, steps: int) -> list[str]:
    """The losses of a training that has a device for itself: in this process."""
    return [loss.hex() for loss in slice_program.losses(seed, steps)]


def ready(*jobs: Job) -> tuple[Job, ...]:
    """They have imported everything, and begin at the next line."""
    for job in jobs:
        job.until(lambda words: words == ["ready"])
    return jobs


def take_the_first_turn(job: Job) -> None:
    """Whatever others do: it waits until it has it."""
    job.say()
    job.until(lambda words: words == ["turn"])


def has_switched(words: list[str]) -> bool:
    return words[0] == "step" and int(words[2]) >= 1


def test_two_trainings_that_do_not_fit_compute_what_they_compute_alone(start: Start) -> None:
    one, other = ready(start("sliced", 1, 4000, 3), start("sliced", 2, 4000, 3))
    for job in (one, other):
        job.say()
    for job in (one, other):
        assert job.end() == 0, job.complaint()
    assert one.switches() + other.switches() >= 4
    for seed, job in ((1, one), (2, other)):
        found = job.losses()
        assert found == alone(seed, len(found))


def test_without_sire_one_of_two_trainings_runs_out_of_memory(start: Start) -> None:
    one = start("alone", 1, 12)
    assert one.until(lambda words: words[0] == "done") == ["done", "False"], "Sire is a part of it"
    other = start("alone", 2, 12)
    assert other.end() != 0
    assert "torch.OutOfMemoryError: CUDA out of memory" in other.complaint()
    one.say()
    assert one.end() == 0, one.complaint()
    assert one.losses() == alone(1, 12)


def test_where_nobody_waits_for_a_turn_nobody_changes_places(start: Start) -> None:
    [lonely] = ready(start("stays", 1, 12))
    lonely.say()
    lonely.until(lambda words: words == ["done"])
    stranger = start("alone", 2, 1)
    assert stranger.end() != 0
    assert "OutOfMemoryError" in stranger.complaint()
    lonely.say()
    assert lonely.end() == 0, lonely.complaint()
    assert lonely.switches() == 0


def test_who_is_killed_in_its_turn_leaves_the_device_to_the_other(start: Start) -> None:
    victim, other = ready(start("gated", 1, 4000), start("sliced", 2, 12))
    take_the_first_turn(victim)
    other.say()
    victim.say()
    victim.until(has_switched)
    victim.process.kill()
    assert other.end() == 0, other.complaint()
    assert other.losses() == alone(2, 12)


def test_who_is_stopped_while_it_waits_holds_up_nobody(start: Start) -> None:
    sleeper, worker = ready(start("gated", 1, 4000, 1), start("gated", 2, 40))
    take_the_first_turn(sleeper)
    sleeper.say()
    take_the_first_turn(worker)
    # So the other waits.
    sleeper.process.send_signal(signal.SIGSTOP)
    try:
        worker.say()
        assert worker.end() == 0, worker.complaint()
    finally:
        sleeper.process.send_signal(signal.SIGCONT)
    assert sleeper.end() == 0, sleeper.complaint()
    assert sleeper.switches() == 1
    assert sleeper.losses() == alone(1, len(sleeper.losses()))
    assert worker.losses() == alone(2, 40)


def test_ctrl_c_in_the_others_turn_waits_for_the_memory_and_twice_ends_cleanly(start: Start) -> None:
    waits, holds = ready(start("patient", 1), start("holds", 2))
    take_the_first_turn(waits)
    waits.until(lambda words: words[0] == "has")
    take_the_first_turn(holds)
    waits.process.send_signal(signal.SIGINT)
    waits.complains("interrupted in another process's turn")
    holds.say()
    # While it computes that nobody waits: else it could make way before it says so.
    assert waits.until(lambda words: words[0] == "has")[1:] == alone(1, 2)[1:]
    take_the_first_turn(holds)
    waits.process.send_signal(signal.SIGINT)
    waits.complains("interrupted in another process's turn")
    waits.process.send_signal(signal.SIGINT)
    # It goes on without its memory: that is an error, and no wrong number.
    assert waits.end() != 0
    assert len([line for line in waits.lines if line.startswith("has")]) == 2
    holds.say()
    assert holds.end() == 0, holds.complaint()


def test_a_mistyped_tag_from_outside_is_refused_in_the_others_turn(start: Start, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    open_door = {"SIRE_CONTROL": "1", "XDG_RUNTIME_DIR": str(tmp_path)}
    waits, holds = ready(start("patient", 1, **open_door), start("holds", 2))
    take_the_first_turn(waits)
    waits.until(lambda words: words[0] == "has")
    take_the_first_turn(holds)
    (door,) = tmp_path.rglob(f"*{waits.process.pid}*.sock")
    with pytest.raises(RefusedError, match="'modle'"):
        ask(str(door), verb="resume", tag="modle", timeout=60, wait=0)
    # What is there comes with the turn, all of it.
    assert ask(str(door), verb="resume", tag="noise", timeout=60, wait=0)["deferred"]
    holds.say()
    waits.process.send_signal(signal.SIGINT)
    assert waits.until(lambda words: words[0] == "has")[1:] == alone(1, 2)[1:]
    holds.process.kill()


def test_a_return_that_fails_in_the_middle_leaves_nothing_half(start: Start) -> None:
    trains, holds = ready(start("gated", 1, 4000, 1), start("holds", 2))
    take_the_first_turn(trains)
    trains.say()
    trains.until(lambda words: words[0] == "step")
    take_the_first_turn(holds)
    stranger = start("stranger", 16)
    away = free(stranger)
    # The turn goes back, to a process that has no room for all it had; it has for a part, and tries again and again.
    holds.say()
    trains.complains("it is this process's turn, but")
    # Somebody waits: so the turn that cannot be used is given up, with whatever came back.
    take_the_first_turn(holds)
    assert free(stranger) == away, "something is left on the device in another's turn"
    stranger.process.kill()
    holds.say()
    assert holds.end() == 0, holds.complaint()
    assert trains.end() == 0, trains.complaint()
    assert trains.switches() == 1
    assert trains.losses() == alone(1, len(trains.losses()))


def test_the_example_shows_that_turns_change_no_number(preloaded: bool, tmp_path: Path) -> None:
    if not preloaded:
        pytest.skip("it is started with sire run")
    environment = {
        **os.environ,
        "SIRE_SIM_DIR": str(tmp_path),
        "SIRE_SIM_MEMORY": "64MiB",
        "TORCHTOOLS_LOCK_DIR": str(tmp_path),
    }
    example = Path(__file__).resolve().parents[3] / "examples" / "time_slices.py"
    done = subprocess.run(
        [sys.executable, str(example)], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: by turns each computes what it computes alone" in done.stdout


def free(stranger: Job) -> int:
    """Bytes of the device that nobody has, by the driver's figures."""
    stranger.say()
    return int(stranger.until(lambda words: words[0] == "free")[1])


@pytest.mark.usefixtures("heard")
def test_who_is_interrupted_while_it_leaves_leaves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = sire.time_slice(group="interrupted")
    turns.__enter__()
    with monkeypatch.context() as interrupted:

        def interrupt() -> None:
            raise KeyboardInterrupt

        interrupted.setattr(torch.cuda, "empty_cache", interrupt)
        with pytest.raises(KeyboardInterrupt):
            turns.__exit__(None, None, None)
    assert turns.figures == {}
    with turns:
        assert turns.figures["state"] == "resident"
    assert sire.stats()["time_slice"] is None


@pytest.mark.usefixtures("heard")
def test_who_leaves_and_enters_again_in_its_turn_has_it_for_as_long_as_before() -> None:
    turns = sire.time_slice(group="again")
    entered = time.monotonic()
    with turns:
        begun = time.monotonic()
        held = torch.ones(1 << 20, device="cuda")
        time.sleep(0.2)
    # Its memory is still there, and so is its turn.
    for _ in range(3):
        left = time.monotonic()
        with turns:
            resident = turns.figures["resident_seconds"]
            assert left - begun <= resident <= time.monotonic() - entered, "the turn is younger than it was"
            assert turns.figures["switches"] == 0
        time.sleep(0.05)
    del held


@pytest.mark.usefixtures("heard")
def test_who_leaves_once_too_often_still_takes_its_next_turn() -> None:
    """It was counted as less than nobody inside, and the next one to enter had no turn."""
    turns = sire.time_slice(group="too often")
    with turns:
        pass
    turns.__exit__(None, None, None)
    with turns:
        assert turns.figures["state"] == "resident"
    assert turns.figures == {}


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("leaves", [True, False])
def test_a_callback_waits_for_nobody_who_ends_the_turns(start: Start, leaves: bool) -> None:
    """Who ends them waits for the pause that is being made, which waits for its callback, which waited for ever."""
    turns, inside, over = sire.time_slice(quantum=0.05), threading.Event(), threading.Event()
    refused: list[str] = []

    def callback(_tag: str | None) -> None:
        inside.set()
        time.sleep(0.5 if leaves else 0)  # until the other thread waits
        for call in (turns.__enter__, lambda: turns.__exit__(None, None, None)):
            try:
                call()
            except sire.BusyError as error:
                refused.append(str(error))

    def train() -> None:
        while not over.is_set():
            sire.safe_point()
            time.sleep(0.01)

    def leave() -> None:
        assert inside.wait(60)
        if not leaves:
            time.sleep(1)  # until the callback is done
        turns.__exit__(None, None, None)
        over.set()

    turns.__enter__()
    held = torch.full((1 << 20,), 7.0, device="cuda")
    registered = sire.before_pause(callback)
    threads = [threading.Thread(target=each, daemon=True) for each in (train, leave)]
    for each in threads:
        each.start()
    [waits] = ready(start("holds", 2))
    waits.say()
    for each in threads:
        each.join(60)
        assert not each.is_alive(), "it waits for ever"
    registered.remove()
    assert len(refused) == (2 if leaves else 0)
    assert all("another thread is just beginning or ending time slices" in each for each in refused)
    sire.resume()
    assert bool((held == 7).all())
    assert sire.stats()["time_slice"] is None


@pytest.mark.usefixtures("heard")
def test_a_time_slice_inside_a_region_holds_what_is_outside_of_all(tag: str) -> None:
    """The region of the thread that enters is its own: what others allocated stayed on the device in others' turns."""
    made: list[torch.Tensor] = []
    with sire.region(tag), sire.time_slice(group="inside"):
        thread = threading.Thread(target=lambda: made.append(torch.ones(1 << 20, device="cuda")))
        thread.start()
        thread.join()
        region = _library.load().allocation(made[0].data_ptr()).region
    assert {each["region"]: each["tag"] for each in sire.stats()["regions"]}[region] == "time-slice"


@pytest.mark.usefixtures("heard")
def test_a_time_slice_keeps_to_the_region_that_there_is(tag: str) -> None:
    """Entered inside of `sire.disable`, it put its own in the place of SIRE_REGION's, and left none."""
    library = _library.load()
    own = library.region_open(tag.encode(), *make_policy("cpu", False, True).fields())
    library.process_region_set(own)
    try:
        with sire.disable(), sire.time_slice(group="disabled"):
            pass
        assert library.region_current() == own
    finally:
        library.process_region_set(None)


def test_what_cannot_be_served_is_refused_with_the_reason(
    preloaded: bool, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHTOOLS_LOCK_DIR", str(tmp_path))
    with pytest.raises(sire.InvalidArgumentError, match="more than 0"):
        sire.time_slice(quantum=0)
    with monkeypatch.context() as rank:
        rank.setenv("WORLD_SIZE", "2")
        with pytest.raises(sire.UnsupportedError, match="one of 2 ranks"):
            sire.time_slice().__enter__()
    if not preloaded:
        if mode == "torch":
            with pytest.raises(sire.UnsupportedError, match="use_allocator"):
                sire.time_slice().__enter__()
        return
    stray = torch.ones(1 << 20, device="cuda")
    with pytest.raises(sire.UnsupportedError, match="before the time slice began"):
        sire.time_slice().__enter__()
    del stray
    fenced = torchtools.reserve_gpu_for_training(0, 4 * MIB, 0)
    with fenced, pytest.raises(sire.UnsupportedError, match="fence=False"):
        sire.time_slice().__enter__()
    # What was refused left no trace: the turn can be had.
    turns = sire.time_slice(quantum=5, group="a group")
    with turns, turns:
        with pytest.raises(sire.UnsupportedError, match="others' memory"):
            torchtools.reserve_gpu_for_training(0, 4 * MIB, 0, strict=True).__enter__()
        with torchtools.reserve_gpu_for_training(0, 4 * MIB, 0, fence=False) as reservation:
            assert reservation.fence == "none"
        held = torch.ones(1 << 20, device="cuda")
        assert turns.figures["state"] == "resident"
        assert turns.figures["turns"] == 1
        with pytest.raises(sire.InvalidArgumentError, match="takes turns on cuda:0"):
            sire.time_slice(group="another").__enter__()
        assert {each["tag"] for each in sire.stats()["regions"] if each["resident_bytes"]} >= {"time-slice"}
    assert sire.stats()["time_slice"] is None
    assert turns.figures == {}
    del held
