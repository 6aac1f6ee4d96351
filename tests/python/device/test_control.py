"""Being asked from outside: memory goes at safe points only, comes back the same; a bad moment is refused."""

from __future__ import annotations

import _thread
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sire
import torch
from measure import MIB, command_or_skip, device_used, region_bytes
from outside import RefusedError, Visitor, ask
from running import line, running, until
from sire import _library
from sire.slyce import SlyceModel

SIZE = 16 * MIB


@pytest.fixture(autouse=True)
def socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The control socket of this process, in a directory of this test's own."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with sire.control.open() as control:
        yield control.path
        sire.control.leave()


def filled(tag: str, value: int = 5) -> torch.Tensor:
    with sire.region(tag, backup="cpu"):
        return torch.full((SIZE,), value, dtype=torch.uint8, device="cuda")


def until_gone(visitor: Visitor, work: Any = None) -> int:
    """Works and passes safe points as long as the visitor is here; how many steps that were."""
    steps = 0
    while visitor.here:
        if work is not None:
            work()
        sire.safe_point()
        steps += 1
        # The visitor is a thread of this process.
        time.sleep(0.001)
    return steps


def test_a_loop_is_paused_between_steps_and_goes_on_with_the_same_numbers(socket: str, tag: str) -> None:
    torch.manual_seed(0)
    with sire.region(tag, backup="cpu"):
        model = torch.nn.Sequential(torch.nn.Linear(2048, 4096), torch.nn.Tanh(), torch.nn.Linear(4096, 2048)).cuda()
    start = torch.randn(1, 2048)

    def generate(steps: int, between: Any) -> torch.Tensor:
        token = start.cuda()
        for _ in range(steps):
            with torch.no_grad():
                token = torch.tanh(model(token))
            between()
        return token.cpu()

    expected = generate(12, lambda: None)
    resident = device_used()

    def visit() -> tuple[int, dict[str, Any], dict[str, Any]]:
        report = ask(socket, verb="pause", tag=tag)["report"]
        used = device_used()
        listed = ask(socket, verb="list")
        before = steps_when_paused(listed)
        time.sleep(0.2)
        assert steps[0] == before, "the program went on while it was paused"
        ask(socket, verb="resume")
        return used, report, listed

    steps = [0]
    seen: list[int] = []

    def more() -> None:
        steps[0] += 1

    def steps_when_paused(listed: dict[str, Any]) -> int:
        assert listed["control"]["paused"] == [tag]
        seen.append(steps[0])
        return seen[0]

    visitor: list[Visitor] = []

    def between() -> None:
        steps[0] += 1
        if steps[0] == 4:
            visitor.append(Visitor(visit))
        if steps[0] == 11:
            # The loop is shorter than the visit otherwise.
            until_gone(visitor[0], more)
        sire.safe_point()

    outcome = generate(12, between)
    used, report, listed = visitor[0].join()
    assert resident - used >= 60 * MIB
    assert report["bytes_moved"] >= 60 * MIB
    [region] = [each for each in listed["stats"]["regions"] if each["tag"] == tag]
    assert region["state"] == "paused"
    assert device_used() == resident
    assert torch.equal(outcome, expected)


@pytest.mark.parametrize("failure", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_socket_that_nobody_got_is_closed(
    socket: str, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """It stayed open, nobody answered what `sire ps` asks, and the next opening began no thread for it either."""
    sire.control.close()
    start = threading.Thread.start

    def fails(self: threading.Thread) -> None:
        if self.name != "sire-control":
            return start(self)
        if isinstance(failure, KeyboardInterrupt):
            start(self)
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        with pytest.raises(type(failure)):
            sire.control.open()
    assert list(Path(socket).parent.glob("*.sock")) == []
    with sire.control.open() as control:
        assert "hook_mode" in ask(control.path, verb="list")["program"]


def test_a_resume_brings_back_exactly_what_the_pause_took(socket: str, tag: str) -> None:
    top, own = filled(tag), filled(f"{tag}/own")
    sire.pause(f"{tag}/own")
    visitor = Visitor(lambda: (ask(socket, verb="pause", tag=tag), ask(socket, verb="resume")))
    until_gone(visitor)
    visitor.join()
    states = {each["tag"]: each["state"] for each in sire.stats()["regions"]}
    assert (states[tag], states[f"{tag}/own"]) == ("resident", "paused")
    assert bool((top == 5).all())
    sire.resume(f"{tag}/own")
    assert bool((own == 5).all())


def test_a_program_without_safe_points_is_not_paused(socket: str, tag: str) -> None:
    tensor = filled(tag)
    with pytest.raises(RefusedError, match=r"came to no safe point within 0\.2 s, and never before") as refused:
        ask(socket, verb="pause", timeout=0.2)
    assert refused.value.code == "refused"
    sire.safe_point()
    with pytest.raises(RefusedError, match=r"passed its last one \d+\.\d s ago"):
        ask(socket, verb="pause", timeout=0.2)
    assert bool((tensor == 5).all())
    # What was refused does not happen later.
    sire.safe_point()
    assert device_used() >= SIZE


def test_a_safe_point_inside_a_region_is_a_bad_moment(socket: str, tag: str) -> None:
    tensor = filled(tag)
    visitor = Visitor(lambda: ask(socket, verb="pause", tag=tag, timeout=1.5))
    with sire.region(tag, backup="cpu"):
        until_gone(visitor)
    with pytest.raises(RefusedError, match=r"no good moment came within 1\.5 s: .*inside"):
        visitor.join()
    # The same request finds the moment when the region is left in time.
    visitor = Visitor(lambda: (ask(socket, verb="pause", tag=tag), ask(socket, verb="resume")))
    with sire.region(tag, backup="cpu"):
        until("it waits", lambda: waiting(socket) == 1)
        for _ in range(3):
            sire.safe_point()
        assert (waiting(socket), region_bytes(tag)["paused_bytes"], visitor.here) == (1, 0, True)
    until_gone(visitor)
    paused, _ = visitor.join()
    assert paused["report"]["bytes_moved"] >= SIZE
    assert bool((tensor == 5).all())


def waiting(socket: str) -> int:
    """How many requests wait for a safe point of this process."""
    return int(ask(socket, verb="list")["control"]["asked"])


def test_all_threads_that_pass_safe_points_are_waited_for(socket: str, tag: str) -> None:
    tensors = [filled(f"{tag}/{number}") for number in range(2)]
    errors: list[BaseException] = []
    working = [False, False]
    visitor: list[Visitor] = []
    gate = threading.Barrier(3)

    def work(number: int) -> None:
        try:
            sire.safe_point()
            gate.wait()
            gate.wait()
            while visitor[0].here:
                working[number] = True
                assert bool((tensors[number] == 5).all())
                torch.cuda.synchronize()
                working[number] = False
                sire.safe_point()
        except BaseException as error:
            errors.append(error)

    def visit() -> None:
        for _ in range(3):
            ask(socket, verb="pause", tag=tag)
            assert working == [False, False]
            assert all(region_bytes(f"{tag}/{number}")["resident_bytes"] == 0 for number in range(2))
            ask(socket, verb="resume")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    gate.wait()
    visitor.append(Visitor(visit))
    gate.wait()
    visitor[0].join()
    for thread in threads:
        thread.join()
    assert errors == []
    # Threads that have ended are not waited for, as soon as the system has cleared them away.
    until("they are forgotten", lambda: ask(socket, verb="list")["control"]["safe_points"] == [])


def test_the_end_of_an_optimizer_step_is_a_safe_point(socket: str, tag: str) -> None:
    def train(steps: int, visitor: Visitor | None) -> torch.Tensor:
        torch.manual_seed(1)
        with sire.region(tag, backup="cpu"):
            model = torch.nn.Linear(512, 512).cuda()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        data = torch.randn(16, 512, device="cuda")
        done = 0
        while done < steps or (visitor is not None and visitor.here):
            optimizer.zero_grad()
            (model(data) - data).square().mean().backward()
            optimizer.step()
            done += 1
            if done == steps:
                weight = model.weight.detach().cpu()
        return weight

    expected = train(5, None)
    visitor = Visitor(lambda: (ask(socket, verb="pause", tag=tag), ask(socket, verb="resume")))
    assert torch.equal(train(5, visitor), expected)
    (paused, _) = visitor.join()
    assert paused["report"]["regions_changed"] >= 1


def test_uses_of_managed_models_begin_and_end_at_safe_points(socket: str) -> None:
    model = torch.nn.Linear(512, 512)
    data = torch.randn(4, 512)
    with sire.auto_manage(model) as managed:
        expected = model(data.to(managed.get_execution_device())).cpu()
    tag = managed.user.name

    def visit() -> None:
        assert ask(socket, verb="pause", tag=tag)["paused"] == [tag]
        until("nobody uses it", lambda: used(ask(socket, verb="list")) == 0)
        ask(socket, verb="resume")

    def used(listed: dict[str, Any]) -> int | None:
        objects = ((listed["program"] or {}).get("models") or {}).get("objects", [])
        return next((int(each["uses"]) for each in objects if each["name"] == tag), None)

    visitor = Visitor(visit)
    while visitor.here:
        with sire.auto_manage(model):
            assert torch.equal(model(data.cuda()).cpu(), expected)
    visitor.join()
    # Between two uses nobody waits for this thread.
    assert ask(socket, verb="list")["control"]["safe_points"] == []


def test_what_the_program_has_paused_itself_stays_paused(socket: str, tag: str) -> None:
    mine, other = filled(f"{tag}/mine", 1), filled(f"{tag}/other", 2)
    sire.pause(f"{tag}/mine")
    visitor = Visitor(lambda: (ask(socket, verb="pause"), ask(socket, verb="resume")))
    until_gone(visitor)
    (paused, resumed) = visitor.join()
    assert paused["paused"] == [None]
    assert resumed["paused"] == []
    states = {each["tag"]: each["state"] for each in sire.stats()["regions"]}
    assert (states[f"{tag}/mine"], states[f"{tag}/other"]) == ("paused", "resident")
    assert bool((other == 2).all())
    visitor = Visitor(lambda: ask(socket, verb="resume", tag=f"{tag}/mine"))
    until_gone(visitor)
    visitor.join()
    assert bool((mine == 1).all())
    visitor = Visitor(lambda: ask(socket, verb="resume"))
    until_gone(visitor)
    with pytest.raises(RefusedError, match="nothing was paused from outside"):
        visitor.join()


def test_callbacks_let_go_before_and_take_hold_after(socket: str, tag: str) -> None:
    tensor = filled(tag)
    heard: list[str] = []
    willing = [False]

    def let_go(_tag: str | None) -> None:
        heard.append("before")
        if not willing[0]:
            raise RuntimeError("not now")

    callbacks = [sire.before_pause(let_go, tag=tag), sire.after_resume(lambda _: heard.append("after"), tag=tag)]
    try:
        visitor = Visitor(lambda: ask(socket, verb="pause", tag=tag))
        until_gone(visitor)
        with pytest.raises(RefusedError, match="a callback of the program's"):
            visitor.join()
        assert heard == ["before", "after"]
        willing[0] = True
        visitor = Visitor(lambda: (ask(socket, verb="pause", tag=tag), ask(socket, verb="resume")))
        until_gone(visitor)
        visitor.join()
        assert heard == ["before", "after", "before", "after"]
    finally:
        for callback in callbacks:
            callback.remove()
    assert bool((tensor == 5).all())


def test_an_unknown_tag_is_refused_at_the_safe_point(socket: str) -> None:
    visitor = Visitor(lambda: ask(socket, verb="pause", tag="no/such/tag"))
    until_gone(visitor)
    with pytest.raises(RefusedError, match="no region has the tag 'no/such/tag'") as refused:
        visitor.join()
    assert refused.value.code == "invalid"


def test_ctrl_c_in_a_paused_program_brings_its_memory_back(socket: str, tag: str) -> None:
    tensor = filled(tag)
    # A pause also gives back what earlier tests have left.
    gc.collect()
    torch.cuda.empty_cache()
    resident = device_used()

    def visit() -> None:
        ask(socket, verb="pause", tag=tag)
        os.kill(os.getpid(), signal.SIGINT)

    visitor = Visitor(visit)
    with pytest.raises(KeyboardInterrupt):
        while True:
            sire.safe_point()
    visitor.join()
    assert device_used() == resident
    assert bool((tensor == 5).all())


@pytest.mark.parametrize("how", ["close", "give up"])
def test_callbacks_hear_of_what_is_resumed_because_nobody_else_can(socket: str, tag: str, how: str) -> None:
    tensor = filled(tag)
    heard: list[tuple[str, str | None]] = []
    callbacks = [
        sire.before_pause(lambda tag: heard.append(("before", tag)), tag=tag),
        sire.after_resume(lambda tag: heard.append(("after", tag)), tag=tag),
    ]

    def visit() -> None:
        ask(socket, verb="pause", tag=tag)
        if how == "close":
            sire.control.close()
        else:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        visitor = Visitor(visit)
        with pytest.raises(KeyboardInterrupt) if how == "give up" else contextlib.nullcontext():
            while visitor.here or how == "give up":
                sire.safe_point()
        visitor.join()
        assert heard == [("before", tag), ("after", tag)]
    finally:
        for callback in callbacks:
            callback.remove()
    assert bool((tensor == 5).all())


def test_one_thread_publishes_however_often_the_socket_is_opened(socket: str) -> None:
    for _ in range(2):
        sire.control.close()
        sire.control.open()
    sire.control.close()
    with sire.control.open():
        names = lambda: [each.name for each in threading.enumerate()].count("sire-control")  # noqa: E731
        until("the others have ended", lambda: names() == 1)
        assert ask(socket, verb="list")["program"] is not None


def test_a_handle_closes_no_socket_that_was_opened_after_its_own(socket: str, tag: str) -> None:
    """An old handle, or mark, once took the socket from whoever had opened it since."""
    handle, mark = sire.control.open(), sire.reclaimable(tag)
    sire.control.close()
    with sire.control.open() as later:
        handle.close()
        mark.close()
        assert ask(later.path, verb="hello")["pid"] == os.getpid()
    assert not Path(later.path).exists()


def test_a_step_of_a_thread_that_python_did_not_start_is_no_safe_point(
    socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []
    monkeypatch.setattr(sire.control, "_pass", lambda: passed.append(threading.current_thread().name))
    done = threading.Event()

    def step() -> None:
        sire.control._after_step(None, None, None)
        done.set()

    _thread.start_new_thread(step, ())
    assert done.wait(60)
    assert passed == []
    sire.control._after_step(None, None, None)
    assert len(passed) == 1


def test_garbage_is_collected_without_a_safe_point(socket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[None] = []
    monkeypatch.setattr(sire.control, "_pass", lambda: passed.append(None))
    sire.control.use_begins()
    assert len(passed) == 1
    sire.control.use_ends(collected=True)
    assert len(passed) == 1, "whatever the thread was doing, it used memory"
    sire.control.use_begins()
    sire.control.use_ends()
    assert len(passed) == 3


def test_what_is_answered_after_reopening_reaches_whoever_asked(socket: str) -> None:
    # The server before took the answers of the next one's clients with it, if it ended while they were asked.
    for _ in range(100):
        sire.control.close()
        path = sire.control.open().path
        assert ask(path, verb="budget", device=0, limit=1 << 40) == {}


def test_closing_resumes_what_is_paused_from_outside(socket: str, tag: str) -> None:
    tensor = filled(tag)

    def visit() -> None:
        ask(socket, verb="pause", tag=tag)
        sire.control.close()

    visitor = Visitor(visit)
    until_gone(visitor)
    visitor.join()
    assert bool((tensor == 5).all())
    assert not os.path.exists(socket)


def test_evict_budget_and_trace_need_no_safe_point(socket: str, tag: str) -> None:
    tensor = filled(tag)
    sire.pause(tag, release="lazy")
    resident = device_used()
    assert ask(socket, verb="evict")["device_bytes"] >= SIZE
    assert resident - device_used() >= SIZE
    assert ask(socket, verb="budget", device=0, limit=1 << 40) == {}
    path = Path(ask(socket, verb="trace")["path"])
    assert path.parent == Path(socket).parent
    sire.resume(tag)
    assert path.stat().st_size > 0
    assert bool((tensor == 5).all())
    with pytest.raises(RefusedError, match=r"recording has begun|already"):
        ask(socket, verb="trace")


def test_managed_models_keep_to_a_budget_from_outside(socket: str, tag: str) -> None:
    sire.setup_default_pools(release="lazy")
    own = filled(tag)
    models = [torch.nn.Linear(1024, 2048) for _ in range(3)]
    managed = [sire.manage(model) for model in models]

    def use(number: int) -> None:
        with sire.auto_manage(models[number]) as device:
            models[number](torch.ones(1, 1024, device=device.get_execution_device()))

    def resident() -> list[bool]:
        return [region_bytes(each.user.name)["resident_bytes"] > 0 for each in managed]

    try:
        use(0)
        use(1)
        assert resident() == [True, True, False]
        # A region of the program's own does not count.
        assert ask(socket, verb="budget", device=0, limit=12 * MIB) == {}
        use(2)
        assert resident() == [False, False, True], "each has 8 MiB"
        # New pools do not undo what was said from outside.
        sire.setup_default_pools(release="lazy")
        use(0)
        assert resident() == [True, False, False]
        assert ask(socket, verb="budget", device=0, limit=4 * MIB) == {}
        with pytest.raises(sire.OutOfMemoryError):
            use(1)
        assert ask(socket, verb="budget", device=0) == {}
        for number in range(3):
            use(number)
        assert resident() == [True, True, True]
        assert bool((own == 5).all())
    finally:
        ask(socket, verb="budget", device=0)
        sire.setup_default_pools(release="eager")


def test_what_others_want_free_outlasts_new_pools(socket: str) -> None:
    def told() -> tuple[int, int]:
        return _library.load().budget(0)[:2]

    try:
        ask(socket, verb="budget", device=0)
        sire.setup_default_pools(headroom=2 * MIB)
        assert told() == (0, 2 * MIB)
        assert ask(socket, verb="budget", device=0, limit=64 * MIB, headroom=16 * MIB) == {}
        for headroom in (MIB, 4 * MIB):
            sire.setup_default_pools(headroom=headroom)
            assert told() == (64 * MIB, 16 * MIB)
        assert ask(socket, verb="budget", device=0, residency=3.5) == {}
        sire.setup_default_pools(headroom=MIB)
        assert _library.load().budget(0) == (0, MIB, 3.5)
        assert ask(socket, verb="budget", device=0) == {}
        for headroom in (4 * MIB, MIB):
            sire.setup_default_pools(headroom=headroom)
            assert told() == (0, headroom)
    finally:
        ask(socket, verb="budget", device=0)
        sire.setup_default_pools(release="eager")


def test_devices_are_told_by_the_drivers_own_figures(socket: str, tag: str) -> None:
    tensor = filled(tag)
    [device] = ask(socket, verb="list")["devices"]
    free, total = torch.cuda.mem_get_info()
    assert (device["total_bytes"], device["free_bytes"]) == (total, free)
    assert device["uuid"] == f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    del tensor


def descriptors(pid: int | str = "self") -> Iterator[tuple[str, os.stat_result]]:
    """What a process has open, less what it closes meanwhile: a server does when its visitor has gone."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(entry), entry.stat()


def holds(path: str) -> bool:
    """Whether this process has the listening socket at `path` open."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    [inode] = [line.split()[6] for line in lines if line.endswith(f" {path}") and line.split()[3] == "00010000"]
    return any(name == f"socket:[{inode}]" for name, _ in descriptors())


def test_a_forked_child_holds_no_part_of_the_socket(socket: str) -> None:
    (reader, writer) = os.pipe()
    assert holds(socket)
    child = os.fork()
    if child == 0:
        # A lock of a thread that is not here would be waited for without end.
        signal.alarm(120)
        os.write(writer, f"{holds(socket)} {sire.control._is_open()}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100).decode() == "False False"
    os.close(reader)
    os.close(writer)
    assert ask(socket, verb="hello")["pid"] == os.getpid()


def test_passing_a_safe_point_costs_next_to_nothing(socket: str) -> None:
    sire.safe_point()
    began = time.thread_time()
    for _ in range(2000):
        sire.safe_point()
    # A hundred times of what it takes, of this thread's own time, so that a busy machine does not matter.
    assert (time.thread_time() - began) / 2000 < 1e-3


PROGRAM = """
import time, sire, torch
with sire.region("weights", backup="cpu"):
    weights = torch.full((64 << 20,), 3, dtype=torch.uint8, device="cuda")
print("ready", flush=True)
while True:
    assert int(weights[:1000].sum()) == 3000
    sire.safe_point()
    time.sleep(0.005)
"""


def test_the_command_pauses_a_preloaded_process_and_the_environment_is_enough(tmp_path: Path) -> None:
    command = command_or_skip()
    environment = {**os.environ, **sire.subprocess_environment(), "SIRE_CONTROL": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(command), *arguments], capture_output=True, text=True, timeout=120, check=False)

    with running([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, env=environment) as process:
        pid = str(process.pid)
        assert line(process) == "ready"
        before = blocks(process.pid)
        paused = run("pause", pid)
        assert paused.returncode == 0, paused.stderr
        assert "64.0 MiB copied" in paused.stdout
        if before is not None:
            assert before - (blocks(process.pid) or 0) >= 63 * MIB
        rows = [row.split() for row in run("ps", "--tags").stdout.splitlines()]
        assert [pid, "paused"] in [row[:2] for row in rows], rows
        assert "weights" in [row[-1] for row in rows], rows
        assert run("resume", pid, "--tag", "nothing").returncode == 1
        assert run("resume", pid).returncode == 0
        assert run("evict", pid).returncode == 0
    assert run("pause", pid).returncode == 3
    assert process.pid not in [found["pid"] for found in json.loads(run("ps", "--json").stdout)["processes"]]


def blocks(pid: int) -> int | None:
    """Bytes that the operating system holds for the software device of a process; None on other devices."""
    found = {status.st_ino: status.st_blocks * 512 for name, status in descriptors(pid) if "memfd:sire-sim" in name}
    return sum(found.values()) if found else None


def test_slices_of_models_are_shown_with_their_places_and_what_happened(socket: str) -> None:
    def part(width: int) -> torch.nn.Module:
        return torch.nn.Linear(width, width)

    names = ("first", "second", "third")
    slices = [{"name": name, "constructor": part, "config": (512,)} for name in names]
    model = SlyceModel(slices, gpu_strategy="active_only", log_to_console=False, prefetch=False)

    def shown() -> list[tuple[str, str, int]]:
        units = ask(socket, verb="list")["program"]["units"]
        own = [each for each in units if each["name"] in names]
        assert len({each["of"] for each in own}) == 1
        return [(each["name"], each["tier"], each["uses"]) for each in own]

    assert shown() == [(name, "not made", 0) for name in names]
    with torch.no_grad():
        for name in ("first", "second"):
            model(torch.ones(1, 512), active_slice=name)
    assert shown() == [("first", "cpu", 1), ("second", "gpu", 1), ("third", "not made", 0)]
    events = ask(socket, verb="list")["program"]["events"]
    assert {("load", "first"), ("offload", "first"), ("load", "second")} <= {(e["kind"], e["name"]) for e in events}
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
    model.close()
    del model
    gc.collect()
    until("whoever is gone is shown no more", lambda: not set(names) & {u["name"] for u in _units(socket)})


def _units(socket: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(socket, verb="list")["program"]["units"]
    return found
