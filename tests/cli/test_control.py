"""Asking a process from outside: ps, pause, resume, evict, top on a terminal."""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from outside import Outside
from running import line, running, until
from watching import Multiplexer, Screen, Terminal

MIB = 1 << 20


# --- ps, pause, resume ------------------------------------------------------------------------------------------------------


def test_ps_shows_what_a_process_holds(outside: Outside) -> None:
    shown = outside.run("ps", "--tags")
    assert shown.returncode == 0
    assert f"{outside.pid}  running  48.0 MiB" in shown.stdout
    assert "32.0 MiB      0 B      0 B  model/weights" in shown.stdout
    [process] = outside.view()["processes"]
    assert str(process["pid"]) == outside.pid
    metrics = outside.run("ps", "--metrics").stdout
    assert f'sire_tag_resident_bytes{{pid="{outside.pid}",tag="model/weights",backup="host"}} {32 * MIB}' in metrics


def test_ps_asks_also_where_the_system_has_no_thread_for_it(outside: Outside) -> None:
    """It panicked; and who waited for memory asked nobody any more."""

    def limited(limit: int, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(outside.command), *words],
            env=outside.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )

    limits = range(4 * MIB, 1024 * MIB, MIB // 4)
    enough = limits[bisect.bisect_left(limits, True, key=lambda limit: limited(limit, "--version").returncode == 0)]
    # No room for the stack of a thread.
    shown = limited(enough + MIB, "ps", "--json")
    assert shown.returncode == 0, shown.stderr
    assert [str(each["pid"]) for each in json.loads(shown.stdout)["processes"]] == [outside.pid]


def test_a_process_is_found_again_whose_socket_has_gone(command: Path, library: Path, stand_in: Path, tmp_path: Path) -> None:
    """A user's runtime directory goes when he logs out, and comes back when he logs in. A paused program that outlived it
    was out of reach for good.
    """
    root, temporary = tmp_path / "run", tmp_path / "tmp"
    root.mkdir(mode=0o700)
    temporary.mkdir()

    def is_found(outside: Outside) -> bool:
        return [str(each["pid"]) for each in outside.view()["processes"]] == [outside.pid]

    with contextlib.closing(Outside(command, library, stand_in, root, TMPDIR=temporary)) as outside:
        assert line(outside.process) == "ready"
        assert outside.run("pause", outside.pid).returncode == 0
        shutil.rmtree(root)
        until("it is found again", lambda: is_found(outside))
        assert [each.parent.parent for each in tmp_path.rglob("*.sock")] == [temporary]
        root.mkdir(mode=0o700)
        until("it is found again", lambda: is_found(outside))
        assert [each.parent.parent for each in tmp_path.rglob("*.sock")] == [root]
        next(root.rglob("*.sock")).unlink()
        until("it is found again", lambda: is_found(outside))
        assert outside.run("resume", outside.pid).returncode == 0
        [process] = outside.view()["processes"]
        assert [each["what"] for each in process["journal"]].count("moved") == 3


def test_a_tag_is_paused_and_everything_resumed(outside: Outside) -> None:
    before = outside.resident()
    paused = outside.run("pause", outside.pid, "--tag", "model", "--json")
    assert paused.returncode == 0, paused.stderr
    assert json.loads(paused.stdout)["report"]["bytes_moved"] == 32 * MIB
    assert before - outside.resident() == 32 * MIB
    assert "held" in outside.run("ps").stdout
    again = outside.run("pause", outside.pid, "--tag", "model")
    assert "was paused already" in again.stdout
    resumed = outside.run("resume", outside.pid, "--json")
    assert resumed.returncode == 0, resumed.stderr
    answer = json.loads(resumed.stdout)
    assert (sum(report["bytes_moved"] for report in answer["reports"]), answer["paused"]) == (32 * MIB, [])
    assert outside.resident() == before
    nothing = outside.run("resume", outside.pid)
    assert nothing.returncode == 4
    assert "nothing was paused from outside" in nothing.stderr


def test_exit_codes_tell_failures_apart(outside: Outside) -> None:
    assert outside.run("pause", "1").returncode == 3
    assert outside.run("pause", outside.pid, "--tag", "none").returncode == 1
    assert outside.run("pause", outside.pid, "--tag", "a//b").returncode == 1
    assert outside.run("pause", "x").returncode == 2
    assert outside.run("pause", outside.pid, "--timeout", "-1").returncode == 2
    outside.process.send_signal(signal.SIGSTOP)
    try:
        # All of its threads: until then it may answer.
        os.waitid(os.P_PID, outside.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert outside.run("resume", outside.pid).returncode == 5
        shown = outside.run("ps", "--timeout", "0.1")
        assert "silent" in shown.stdout
        assert "is it stopped?" in shown.stdout
    finally:
        outside.process.send_signal(signal.SIGCONT)


def test_budget_evict_and_record(outside: Outside) -> None:
    assert "at most 64.0 MiB" in outside.run("budget", outside.pid, "--limit", "64MiB").stdout
    assert "at most what there is, 1.0 MiB stay free" in outside.run("budget", outside.pid, "--headroom", "1MiB").stdout
    assert "0 B given back" in outside.run("evict", outside.pid).stdout
    path = Path(outside.run("record", outside.pid).stdout.split("recording in ")[1].strip())
    assert path.is_file()
    assert outside.run("replay", str(path), "--info").returncode == 0


IDLE = """
import sys
import sire
from sire import _library

with sire.region("weights", backup="cpu"):
    weights = _library.load().allocate(2 << 20, 0)
sire.pause("weights", release="lazy")
print(sire.control.open().path, flush=True)
sys.stdin.readline()
sire.safe_point()
print("passed", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def idle(outside: Outside, library: Path, stand_in: Path) -> Iterator[subprocess.Popen[str]]:
    """A program beside the other one, with 2 MiB of a device of 64 that are paused lazily; it passes a safe point at each line that it is sent."""
    environment = clean_environment(
        PYTHONPATH=ROOT / "python-shim" / "src",
        SIRE_LIBRARY=library,
        SIRE_LIBCUDA=stand_in,
        SIRE_SIM_MEMORY="64MiB",
        XDG_RUNTIME_DIR=outside.environment["XDG_RUNTIME_DIR"],
    )
    with running([sys.executable, "-c", IDLE], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert line(program).endswith(".sock")
        yield program


def test_what_finds_no_moment_is_refused_with_the_reason_and_what_needs_none_is_done(outside: Outside, library: Path, stand_in: Path) -> None:
    with idle(outside, library, stand_in) as program:
        refused = outside.run("pause", program.pid, "--timeout", "0.2")
        assert refused.returncode == 4
        assert "came to no safe point within 0.2 s, and never before" in refused.stderr
        assert "Nothing has changed." in refused.stderr
        # Lazily paused memory is on the device until somebody wants it.
        evicted = outside.run("evict", program.pid)
        assert (evicted.returncode, evicted.stdout) == (0, f"{program.pid} 2.0 MiB given back\n"), evicted.stderr
        for _ in range(2):
            evicted = outside.run("evict", program.pid, "--json")
            assert json.loads(evicted.stdout)["device_bytes"] == 0
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()
        # What was refused does not happen later.
        assert line(program) == "passed"
        later = outside.run("pause", program.pid, "--timeout", "0.2", "--json")
        assert later.returncode == 4
        assert "passed its last one" in later.stderr


def test_room_is_made_within_the_budget_that_was_set_from_outside(outside: Outside, library: Path, stand_in: Path) -> None:
    with idle(outside, library, stand_in) as program:

        def room(size: str) -> subprocess.CompletedProcess[str]:
            return outside.run("evict", program.pid, "--device", "0", "--bytes", size, "--json")

        def budget(*limits: str) -> None:
            assert json.loads(outside.run("budget", program.pid, "--json", *limits).stdout) == {}

        # The device has 62 MiB left.
        assert json.loads(room("32MiB").stdout) == {"device_bytes": 0, "tags": []}
        budget("--headroom", "60MiB")
        refused = room("16MiB")
        assert (refused.returncode, "raise the budget" in refused.stderr) == (1, True), refused.stderr
        budget("--limit", "33MiB")
        assert json.loads(room("32MiB").stdout) == {"device_bytes": 2 * MIB, "tags": ["weights"]}
        refused = room("34MiB")
        assert (refused.returncode, "raise the budget" in refused.stderr) == (1, True), refused.stderr
        budget()
        assert json.loads(room("34MiB").stdout) == {"device_bytes": 0, "tags": []}
        path = Path(json.loads(outside.run("record", program.pid, "--json").stdout)["path"])
        assert path.parent.parent == Path(outside.environment["XDG_RUNTIME_DIR"])
        assert path.is_file()


TOLD = """
import sys
import sire
from sire import _library

with sire.region("weights"):
    weights = _library.load().allocate(2 << 20, 0)
sire.safe_point()
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(("told", "sockets"), [(None, 0), ("0", 0), ("1", 1)])
def test_nobody_is_asked_who_has_not_said_so(command: Path, library: Path, stand_in: Path, tmp_path: Path, told: str | None, sockets: int) -> None:
    tmp_path.chmod(0o700)
    # Wherever a socket could be.
    place: dict[str, str | Path | None] = {"XDG_RUNTIME_DIR": tmp_path, "TMPDIR": tmp_path}
    own = {"PYTHONPATH": ROOT / "python-shim" / "src", "SIRE_LIBRARY": library, "SIRE_LIBCUDA": stand_in, "SIRE_SIM_MEMORY": "64MiB", "SIRE_CONTROL": told}
    with running([sys.executable, "-c", TOLD], env=clean_environment(**place, **own), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert line(program) == "ready"
        shown = subprocess.run([command, "ps", "--json"], env=clean_environment(**place), capture_output=True, text=True, timeout=60, check=True)
        assert [each["pid"] for each in json.loads(shown.stdout)["processes"]] == [program.pid] * sockets
        assert len(list(tmp_path.rglob("*.sock"))) == sockets


def test_an_empty_machine_is_an_answer(outside: Outside, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    environment = {**outside.environment, "XDG_RUNTIME_DIR": str(tmp_path)}
    shown = subprocess.run([str(outside.command), "ps"], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (shown.returncode, shown.stdout) == (0, "")
    assert "SIRE_CONTROL=1" in shown.stderr
    (tmp_path / "sire").chmod(0o755)
    refused = subprocess.run([str(outside.command), "ps"], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert refused.returncode == 1
    assert "not this user's alone" in refused.stderr


ENDING = """
import sys
import sire
from sire import _library

with sire.region("weights"):
    weights = _library.load().allocate(2 << 20, 0)
print(sire.control.open().path, flush=True)
sys.stdin.readline()
"""


def asked(outside: Outside, pid: int) -> int:
    """How many wait for a safe point of the process."""
    found = json.loads(outside.run("ps", "--json").stdout)["processes"]
    return sum(each["control"]["asked"] for each in found if each["pid"] == pid)


def test_a_process_ends_at_once_though_somebody_waits_for_its_safe_point(outside: Outside, library: Path, stand_in: Path) -> None:
    runtime = outside.environment["XDG_RUNTIME_DIR"]
    environment = clean_environment(
        PYTHONPATH=ROOT / "python-shim" / "src", SIRE_LIBRARY=library, SIRE_LIBCUDA=stand_in, SIRE_SIM_MEMORY="64MiB", XDG_RUNTIME_DIR=runtime
    )
    command = [sys.executable, "-c", ENDING]
    with (
        running(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program,
        socket.socket(socket.AF_UNIX) as client,
    ):
        path = line(program)
        client.settimeout(120)
        client.connect(path)
        client.sendall(b'{"verb":"pause","timeout":3600}\n')
        until("somebody waits", lambda: asked(outside, program.pid) == 1)
        program.communicate("\n", timeout=120)
        assert program.returncode == 0
        assert client.recv(100) == b""
    assert not os.path.exists(path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_know_the_verbs(outside: Outside, shell: str) -> None:
    script = outside.run("completions", shell).stdout
    assert "dashboard" in script
    assert "pause" in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_read_its_completions(outside: Outside, shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"not installed: {shell}")
    script = tmp_path / "completions"
    script.write_text(outside.run("completions", shell).stdout)
    subprocess.run([shell, "-n", script], check=True, timeout=300)


@pytest.mark.parametrize("told", ["completions bash", "top --json --interval 0.1", "doctor"])
def test_a_reader_that_is_gone_ends_the_command_quietly(outside: Outside, told: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with running([outside.command, *told.split()], env=outside.environment, stdout=writes, stderr=subprocess.PIPE) as command:
        os.close(writes)
        said = command.communicate(timeout=120)[1]
    assert (command.returncode, said) == (-signal.SIGPIPE, "")


# --- top ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 40])
def test_top_shows_and_does_on_a_terminal(outside: Outside, columns: int) -> None:
    with Terminal([str(outside.command), "top", "--interval", "0.1"], outside.environment, columns) as terminal:
        look_and_press(terminal, outside, columns)
        terminal.press("q")
        assert terminal.ended() == 0


@pytest.mark.parametrize("columns", [80, 40])
def test_top_is_at_home_in_a_terminal_multiplexer(outside: Outside, columns: int, tmp_path: Path) -> None:
    command = [str(outside.command), "top", "--interval", "0.1"]
    with Multiplexer(command, outside.environment, tmp_path, columns) as terminal:
        look_and_press(terminal, outside, columns)
        # A window that is dragged, a phone that is turned: what fits is there at once, and nothing is left of what was there before.
        other = 120 - columns
        terminal.resize(other)
        is_wide = other == 80
        until("it fills the window", lambda: any("BACKUPS" in line for line in terminal.lines()) == is_wide)
        terminal.shows("sire top  1 process", f"{outside.pid} running", "model/weights", "q quit" if is_wide else "p r e q")
        assert all(len(line) <= other for line in terminal.lines())
        terminal.resize(other, 8)
        until("the keys are on the last of 8 lines", lambda: len(found := terminal.lines()) == 8 and "q" in found[-1])
        terminal.press("q")
        assert terminal.ended() == 0


def look_and_press(terminal: Screen, outside: Outside, columns: int) -> None:
    terminal.shows("sire top  1 process", f"{outside.pid} running", "DEVICE", "model/weights", "safe points", "EVENTS")
    until("the device's bar is drawn", lambda: any("of 256 MiB" in line and "[#" in line for line in terminal.lines()))
    assert all(len(line) <= columns for line in terminal.lines())
    assert any("BACKUPS" in line and "COMMAND" in line for line in terminal.lines()) == (columns == 80)
    # The first tag, by its key; then everything.
    terminal.press("l")
    terminal.press("p")
    terminal.shows(f"pause {outside.pid} model/weights: done", f"{outside.pid} held", "paused")
    terminal.press("r")
    terminal.shows(f"resume {outside.pid} model/weights: done", f"{outside.pid} running")
    terminal.press("h")
    terminal.press("p")
    terminal.shows(f"pause {outside.pid}: done", f"{outside.pid} paused")
    terminal.press("r")
    terminal.shows(f"resume {outside.pid}: done", f"{outside.pid} running")


@contextlib.contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """Meanwhile the process can open nothing."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_a_look_that_fails_is_shown_and_top_goes_on(outside: Outside) -> None:
    """One was the end of it."""
    with Terminal([str(outside.command), "top", "--interval", "0.1"], outside.environment, 80) as terminal:
        terminal.shows(f"{outside.pid} running")
        with without_descriptors(terminal.pid):
            terminal.shows("nothing new is seen: could not list the processes", f"{outside.pid} running")
        until("it sees again", lambda: not any("nothing new" in text for text in terminal.lines()))
        terminal.press("q")
        assert terminal.ended() == 0


def test_a_look_that_fails_is_said_and_lines_go_on(outside: Outside) -> None:
    told = [outside.command, "top", "--json", "--interval", "0.1"]
    with running(told, env=outside.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as top:
        assert line(top)
        assert top.stderr is not None
        with without_descriptors(top.pid):
            assert top.stderr.readline().startswith("sire: nothing new is seen: could not list the processes")
        # More of them than may have been under way.
        assert all(json.loads(line(top))["processes"] for _ in range(5))


def test_top_without_a_terminal_says_what_to_do(outside: Outside) -> None:
    refused = outside.run("top")
    assert refused.returncode == 2
    assert "--json" in refused.stderr
    lines = outside.run("top", "--json", "--looks", "2", "--interval", "0.1").stdout.splitlines()
    assert [str(json.loads(line)["processes"][0]["pid"]) for line in lines] == [outside.pid] * 2
