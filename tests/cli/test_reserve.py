"""`sire reserve` and `sire probe`: waiting, holding, exit codes, and what was needed. NVML is the software device's."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from containers import container
from running import LIMIT, line, running, until

Start = Callable[..., "subprocess.Popen[str]"]

MIB = 1024**2


@pytest.fixture
def environment(stand_in: Path, tmp_path: Path) -> dict[str, str]:
    """A machine with one software device of 512 MiB."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    (libraries / "libnvidia-ml.so.1").symlink_to(stand_in)
    (tmp_path / "device").mkdir()
    variables = {
        "LD_LIBRARY_PATH": libraries,
        "TORCHTOOLS_LOCK_DIR": tmp_path,
        "SIRE_SIM_DIR": tmp_path / "device",
        "SIRE_SIM_MEMORY": "512MiB",
    }

    return clean_environment(**variables)


@pytest.fixture
def start(command: Path, environment: dict[str, str]) -> Iterator[Start]:
    """Starts the command on that machine; it ends with the test at the latest."""
    with contextlib.ExitStack() as started:

        def run(*arguments: str, within: Sequence[str] = ()) -> subprocess.Popen[str]:
            told = [*within, command, *arguments]
            return started.enter_context(running(told, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE))

        yield run


def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=120)
    return child.returncode, out, err


def test_the_program_runs_with_its_reservation_and_its_exit_code(start: Start) -> None:
    code, out, err = ended(start("reserve", "--json", "--bytes", "100MiB", "--", "sh", "-c", "echo $SIRE_RESERVED; exit 7"))
    report = json.loads(err)
    assert (code, report["reserved_bytes"]) == (7, 100 * MIB)
    assert out.strip() == f"{report['gpu']}:{100 * MIB}"


def test_who_holds_is_waited_for_and_who_is_killed_is_not(start: Start) -> None:
    holder = start("reserve", "--bytes", "300MiB", "--", "sh", "-c", "echo ready; exec sleep 100")
    assert line(holder) == "ready"
    code, _, err = ended(start("reserve", "--bytes", "300MiB", "--timeout", "0.1", "--", "true"))
    assert code == 75
    assert "are missing" in err
    assert ended(start("reserve", "--bytes", "200MiB", "--timeout", "0", "--", "true"))[0] == 0
    waiting = start("reserve", "--bytes", "400MiB", "--", "true")
    holder.send_signal(signal.SIGKILL)
    ended(holder)
    assert ended(waiting)[0] == 0


def test_a_gpu_that_is_divided_is_reserved_by_its_parts(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    environment["SIRE_SIM_MIG"] = "2"
    holder = start("reserve", "--json", "--gpu", "0:1", "--bytes", "200MiB", "--", "sh", "-c", "echo $SIRE_RESERVED; exec sleep 100")
    part, _, size = line(holder).partition(":")
    assert (part[:4], size) == ("MIG-", str(200 * MIB))
    # The same part, by its name; the other one; and the whole, which nobody can use.
    assert ended(start("reserve", "--gpu", part, "--bytes", "200MiB", "--timeout", "0", "--", "true"))[0] == 75
    code, out, _ = ended(start("reserve", "--gpu", "0:0", "--bytes", "200MiB", "--timeout", "0", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"))
    assert (code, out[:4], out.strip() == part) == (0, "MIG-", False)
    code, _, err = ended(start("reserve", "--gpu", "0", "--bytes", "200MiB", "--timeout", "0", "--", "true"))
    assert code == 2
    assert "there is no GPU '0'" in err
    assert f"0:0 ({out.strip()}), 0:1 ({part})" in err
    assert {path.name for path in tmp_path.glob("sire-ledger-*")} == {f"sire-ledger-{name}" for name in (part, out.strip())}


SEES = ["--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]


@pytest.fixture
def gpus(start: Start, environment: dict[str, str]) -> list[str]:
    """Two devices, by their UUIDs."""
    environment["SIRE_SIM_DEVICES"] = "2"
    return [ended(start("probe", "--gpu", number, *SEES))[1].splitlines()[0] for number in ("0", "1")]


@pytest.mark.parametrize("verb", ["reserve", "probe"])
def test_the_gpu_is_the_one_that_the_variable_names_first(start: Start, environment: dict[str, str], gpus: list[str], verb: str) -> None:
    """Whoever had been given the second ran on the first."""
    for visible in ("1", "1,0", " 1 ", gpus[1], f"{gpus[1]},{gpus[0]}"):
        environment["CUDA_VISIBLE_DEVICES"] = visible
        code, out, err = ended(start(verb, *SEES))
        assert (code, out.splitlines()[0], err) == (0, gpus[1], ""), visible
    for visible in ("", "-1", "2", "GPU-ffff", "no"):
        environment["CUDA_VISIBLE_DEVICES"] = visible
        code, out, err = ended(start(verb, *SEES))
        assert (code, out) == (2, ""), visible
        assert f"CUDA_VISIBLE_DEVICES={visible} names no GPU" in err
        assert f"0 ({gpus[0]}), 1 ({gpus[1]})" in err


def test_a_gpu_that_is_told_counts_and_what_contradicts_is_said(start: Start, environment: dict[str, str], gpus: list[str]) -> None:
    environment["CUDA_VISIBLE_DEVICES"] = "1"
    code, out, err = ended(start("reserve", "--gpu", "0", *SEES))
    assert (code, out.strip(), err) == (0, gpus[0], "sire: --gpu 0 is none of CUDA_VISIBLE_DEVICES=1; --gpu counts\n")
    environment["CUDA_VISIBLE_DEVICES"] = "1,0"
    assert ended(start("reserve", "--gpu", "0", *SEES)) == (0, f"{gpus[0]}\n", "")


def test_of_a_gpu_that_is_divided_the_variable_names_the_first_part(start: Start, environment: dict[str, str]) -> None:
    environment.update(SIRE_SIM_DEVICES="2", SIRE_SIM_MIG="2")
    part = ended(start("reserve", "--gpu", "1:0", *SEES))[1]
    for visible in ("1", part.strip()):
        environment["CUDA_VISIBLE_DEVICES"] = visible
        assert ended(start("reserve", *SEES)) == (0, part, "")


def test_containers_that_share_the_directory_keep_apart(start: Start) -> None:
    """In each of them the command is process 1; and nobody in one can see whether a process of the other lives."""
    within = container()
    if within is None:
        pytest.skip("this machine lets nobody have a PID namespace, or has no unshare (util-linux)")
    holding = ["--", "sh", "-c", "echo $PPID; exec sleep 300"]
    one, other = (start("reserve", "--bytes", size, *holding, within=within) for size in ("250MiB", "200MiB"))
    assert [line(one), line(other)] == ["1", "1"]
    for place in ((), within):
        code, _, err = ended(start("reserve", "--bytes", "100MiB", "--timeout", "0", "--", "true", within=place))
        assert (code, "are missing" in err) == (75, True), err
        assert ended(start("reserve", "--bytes", "50MiB", "--timeout", "0", "--", "true", within=place))[0] == 0
    # The container is killed as a whole: what was in it is free, and what is in the other is not.
    waiting = start("reserve", "--bytes", "300MiB", "--", "true")
    one.kill()
    ended(one)
    assert ended(waiting)[0] == 0
    assert ended(start("reserve", "--bytes", "350MiB", "--timeout", "0", "--", "true"))[0] == 75
    assert other.poll() is None


OWNER = """
import time
import sire
from sire import _library

with sire.region("model", backup="cpu"):
    weights = _library.load().allocate(40 << 20, 0)
mark = sire.reclaimable("model", priority=1)
print("ready", flush=True)
while "back_seconds" not in mark.figures:
    sire.safe_point()
    time.sleep(0.002)
print("back", flush=True)
"""


def test_memory_that_is_marked_gives_way_until_the_program_ends(
    start: Start, environment: dict[str, str], library: Path, stand_in: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    # Of the fixture that starts the command, too.
    environment.update(SIRE_SIM_MEMORY="64MiB", XDG_RUNTIME_DIR=str(tmp_path))
    own = {"PYTHONPATH": str(ROOT / "python-shim" / "src"), "SIRE_LIBRARY": str(library), "SIRE_LIBCUDA": str(stand_in)}
    wanted = ["--bytes", "40MiB"]
    with running([sys.executable, "-c", OWNER], env={**environment, **own}, stdout=subprocess.PIPE) as owner:
        assert line(owner) == "ready"
        code, _, err = ended(start("reserve", "--preempt", "--timeout", "0.5", *wanted, "--", "true"))
        assert (code, "Nobody gave way" in err) == (75, True), err
        code, out, err = ended(start("reserve", "--preempt=1", "--json", *wanted, "--", "sh", "-c", "echo $SIRE_RESERVED"))
        assert (code, out.strip().endswith(f":{40 * MIB}")) == (0, True), err
        assert line(owner) == "back"


def test_ctrl_c_ends_the_wait(start: Start, tmp_path: Path) -> None:
    holder = start("reserve", "--bytes", "300MiB", "--", "sh", "-c", "echo ready; exec sleep 300")
    assert line(holder) == "ready"
    marker = tmp_path / "started"
    waiting = start("reserve", "--bytes", "300MiB", "--", "touch", str(marker))
    [ledger] = tmp_path.glob("sire-ledger-*")
    until("it waits", lambda: waiting.pid in waiters(ledger))
    waiting.send_signal(signal.SIGINT)
    assert ended(waiting)[0] == -signal.SIGINT
    assert not marker.exists()
    assert holder.poll() is None
    # Its place in the queue is nobody's any more.
    assert ended(start("reserve", "--bytes", "200MiB", "--timeout", "0", "--", "true"))[0] == 0


def waiters(ledger: Path) -> list[int]:
    """Processes that wait, by the records of a ledger (crates/sire-ledger/src/layout.rs): each has 64 bytes, with a state and a number in them."""
    content = ledger.read_bytes()
    records = [struct.unpack_from("<8xI4xI", content, at) for at in range(4096, len(content), 64)]
    return [pid for state, pid in records if state == 1]


COUNTING = """
import os, signal, sys
def told(number, _frame):
    os.write(1, f"{signal.Signals(number).name}\\n".encode())
    if number == signal.SIGTERM:
        os._exit(3)
signal.signal(signal.SIGINT, told)
signal.signal(signal.SIGTERM, told)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


def handled(pid: int) -> bool:
    """Whether a process sleeps with no SIGINT before it: whatever it does about one it has done."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"^(\w+):\s+(\S+)", status, flags=re.M))
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return fields["State"] == "S" and not pending & 1 << (signal.SIGINT - 1)


@pytest.mark.parametrize("where", ["terminal", "kill"])
def test_one_ctrl_c_is_one(command: Path, environment: dict[str, str], where: str) -> None:
    """The terminal tells the whole group; who tells the command alone has it passed on. The program hears it once, both times."""
    arguments = [str(command), "reserve", "--", sys.executable, "-c", COUNTING]
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.execve(arguments[0], arguments, environment)
        finally:
            os._exit(127)
    said = os.fdopen(terminal, "rb", buffering=0)
    try:
        with watchdog(pid):
            heard = read_until(said, b"ready\r\n")
            if where == "terminal":
                os.write(terminal, b"\x03")
            else:
                os.kill(pid, signal.SIGINT)
            heard += read_until(said, b"SIGINT\r\n")
            until("the command has done its part", lambda: handled(pid))
            os.kill(pid, signal.SIGTERM)
            heard += read_until(said, b"SIGTERM\r\n")
            _, status = os.waitpid(pid, 0)
    except BaseException:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        said.close()
    assert heard.count(b"SIGINT") == 1, heard
    assert os.waitstatus_to_exitcode(status) == 3


@contextlib.contextmanager
def watchdog(pid: int) -> Iterator[None]:
    """Kills a child of this process that takes too long."""
    timer = threading.Timer(LIMIT, os.kill, (pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_until(said: FileIO, what: bytes) -> bytes:
    """All that is said up to there, or to the end."""
    heard = b""
    with contextlib.suppress(OSError):
        while what not in heard:
            piece = said.read(1 << 12)
            if not piece:
                break
            heard += piece
    assert what in heard, heard
    return heard


def test_signals_reach_the_program_and_its_end_is_ours(start: Start) -> None:
    child = start("reserve", "--", "sh", "-c", "trap 'echo told; exit 3' TERM; echo $$; while :; do sleep 0.02; done")
    program = int(line(child))
    child.send_signal(signal.SIGTERM)
    code, out, _ = ended(child)
    assert (code, out) == (3, "told\n")
    with pytest.raises(ProcessLookupError):
        os.kill(program, 0)


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_signals_that_ask_for_a_checkpoint_reach_the_program(start: Start, name: str) -> None:
    """The command died of them, and its reservation with it, while the program was told to end."""
    script = f"trap 'echo told' {name}; trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done"
    child = start("reserve", "--", "sh", "-c", script)
    assert line(child) == "ready"
    child.send_signal(signal.Signals[f"SIG{name}"])
    assert line(child) == "told"
    child.send_signal(signal.SIGTERM)
    assert ended(child)[0] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--bytes", "x"), 2, "not a size"),
        (("--bytes", "1TiB"), 2, "can never be reserved"),
        (("--gpu", "9"), 2, "there is no GPU '9'"),
        (("--timeout=-1",), 2, "--timeout"),
    ],
)
def test_what_cannot_be_is_refused(start: Start, arguments: tuple[str, ...], code: int, says: str) -> None:
    found, _, err = ended(start("reserve", *arguments, "--", "true"))
    assert (found, says in err) == (code, True), err


@pytest.mark.parametrize("verb", ["reserve", "probe"])
@pytest.mark.parametrize("time", ["-1", "nan", "inf", "soon"])
def test_what_is_no_time_is_refused(start: Start, verb: str, time: str) -> None:
    code, out, err = ended(start(verb, f"--timeout={time}", "--", "echo", "ran"))
    assert (code, out, "--timeout" in err) == (2, "", True), err


def test_without_a_driver_the_reason_is_given(sire: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = sire("reserve", "--", "true", LD_LIBRARY_PATH="/nonexistent")
    assert done.returncode in (0, 1), "a machine with a GPU has the library"
    assert done.returncode == 0 or "libnvidia-ml.so.1" in done.stderr


HOLDING = """
import sys
import sire
from sire import _library

with sire.region("weights"):
    weights = _library.load().allocate(int(sys.argv[1]) << 20, 0)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holding(environment: dict[str, str], library: Path, stand_in: Path) -> list[str]:
    """A program that allocates so many MiB as it is told, and keeps them until it is sent a line. It is a grandchild of who starts it, whose exit code is 3."""
    environment.update(PYTHONPATH=str(ROOT / "python-shim" / "src"), SIRE_LIBRARY=str(library), SIRE_LIBCUDA=str(stand_in))
    return ["sh", "-c", '"$0" -c "$@" && exit 3', sys.executable, HOLDING]


def test_what_the_program_has_already_is_not_kept_from_others_twice(start: Start, holding: list[str]) -> None:
    holder = start("reserve", "--bytes", "300MiB", "--", *holding, "200")
    assert line(holder) == "ready"
    # The driver calls 312 MiB free, of which 100 are the program's. Until its 200 are noted, 300 seem to be.
    assert ended(start("reserve", "--bytes", "200MiB", "--timeout", "30", "--", "true"))[0] == 0
    assert ended(start("reserve", "--bytes", "250MiB", "--timeout", "0", "--", "true"))[0] == 75
    assert holder.communicate("\n", timeout=120)[0] == ""
    assert holder.returncode == 3
    assert ended(start("reserve", "--bytes", "500MiB", "--timeout", "0", "--", "true"))[0] == 0


def test_in_a_container_what_the_program_has_is_not_kept_from_others_twice(start: Start, environment: dict[str, str], holding: list[str]) -> None:
    """NVML lists no processes there: nothing was noted, and the second waited for ever."""
    environment["SIRE_SIM_HIDDEN"] = "1"
    holder = start("reserve", "--bytes", "300MiB", "--", *holding, "200")
    assert line(holder) == "ready"
    assert ended(start("reserve", "--bytes", "200MiB", "--timeout", "30", "--", "true"))[0] == 0
    assert ended(start("reserve", "--bytes", "250MiB", "--timeout", "0", "--", "true"))[0] == 75
    assert holder.communicate("\n", timeout=120)[0] == ""
    assert ended(start("reserve", "--bytes", "500MiB", "--timeout", "0", "--", "true"))[0] == 0


def test_in_a_container_what_somebody_else_takes_is_not_the_programs(start: Start, environment: dict[str, str], holding: list[str]) -> None:
    """As far as reservations say who that is: the bytes of one that has taken nothing yet stay its own."""
    environment["SIRE_SIM_HIDDEN"] = "1"
    idle = start("reserve", "--bytes", "300MiB", "--", "sh", "-c", "echo ready; read line")
    assert line(idle) == "ready"
    busy = start("reserve", "--bytes", "150MiB", "--", *holding, "140")
    assert line(busy) == "ready"
    # Both have looked since.
    for each in (idle, busy):
        before = sleeps(each.pid)
        until("it has looked", lambda each=each, before=before: sleeps(each.pid) >= before + 3)
    assert ended(start("reserve", "--bytes", "70MiB", "--timeout", "0", "--", "true"))[0] == 75
    for each in (idle, busy):
        each.communicate("\n", timeout=120)


def sleeps(pid: int) -> int:
    """How often it has gone to sleep of its own."""
    return int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), flags=re.M)[0])


@pytest.mark.parametrize("source", ["processes", "device"])
@pytest.mark.parametrize("form", ["--json", "text"])
def test_a_probe_says_how_much_the_program_and_its_children_had(start: Start, environment: dict[str, str], holding: list[str], form: str, source: str) -> None:
    """In a container it was "0 bytes at most"."""
    environment["SIRE_SIM_HIDDEN"] = str(int(source == "device"))
    options = ["--json"] if form == "--json" else []
    probe = start("probe", *options, "--", *holding, "64")
    assert line(probe) == "ready"
    # It sleeps between two looks.
    before = sleeps(probe.pid)
    until("it has looked", lambda: sleeps(probe.pid) >= before + 10)
    out, err = probe.communicate("\n", timeout=120)
    assert probe.returncode == 3, err
    peak = json.loads(out)["peak_bytes"] if options else int(out.split()[0])
    # With what the driver itself needs.
    assert 64 * MIB <= peak <= 96 * MIB
    if options:
        assert json.loads(out)["source"] == source
    else:
        assert ("by the device's figures" in out) == (source == "device")


def test_a_probe_says_what_was_needed_and_ends_what_takes_too_long(start: Start) -> None:
    code, out, _ = ended(start("probe", "--json", "--", "sh", "-c", "exit 5"))
    report = json.loads(out)
    assert (code, report["exit_code"], report["peak_bytes"], report["timed_out"]) == (5, 5, 0, False)
    code, out, _ = ended(start("probe", "--json", "--timeout", "0.2", "--", "sleep", "1000"))
    # `ended` does not wait for so long.
    assert (code, json.loads(out)["timed_out"]) == (124, True)


STUBBORN = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(300)"


@pytest.mark.parametrize(
    "script",
    ["sleep 300 & echo $!; wait", "(sleep 300 & echo $!) ; sleep 300", "setsid sleep 300 & echo $!; wait", '"$0" -c "$1"; true'],
    ids=["child", "orphan", "session", "stubborn"],
)
def test_what_takes_too_long_is_ended_with_all_that_it_has_started(start: Start, script: str) -> None:
    """Only the program itself was: what held the memory went on."""
    probe = start("probe", "--json", "--timeout", "1", "--", "sh", "-c", script, sys.executable, STUBBORN)
    child = int(line(probe))
    code, out, _ = ended(probe)
    assert (code, json.loads(out)["timed_out"]) == (124, True)
    with pytest.raises(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def test_what_takes_too_long_may_end_itself(start: Start) -> None:
    """It was killed at once, whatever it had to put away."""
    code, out, _ = ended(start("probe", "--timeout", "0.5", "--", "sh", "-c", "trap 'echo away; exit 3' TERM; while :; do sleep 0.02; done"))
    assert (code, out.splitlines()[0]) == (124, "away")
