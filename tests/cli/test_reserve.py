"""`sire reserve` and `sire probe`: waiting, holding, exit codes, and what was needed. NVML is the software device's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import clean_environment

Start = Callable[..., "subprocess.Popen[str]"]

MIB = 1024**2


@pytest.fixture
def start(command: Path, stand_in: Path, tmp_path: Path) -> Start:
    """Starts the command on a machine with one software device of 512 MiB."""
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

    def run(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen([str(command), *arguments], env=clean_environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


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
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    code, _, err = ended(start("reserve", "--bytes", "300MiB", "--timeout", "0.1", "--", "true"))
    assert code == 75
    assert "are missing" in err
    assert ended(start("reserve", "--bytes", "200MiB", "--timeout", "0", "--", "true"))[0] == 0
    waiting = start("reserve", "--bytes", "400MiB", "--", "true")
    holder.send_signal(signal.SIGKILL)
    ended(holder)
    assert ended(waiting)[0] == 0


def test_signals_reach_the_program_and_its_end_is_ours(start: Start) -> None:
    child = start("reserve", "--", "sh", "-c", "trap 'echo told; exit 3' TERM; echo $$; while :; do sleep 0.02; done")
    assert child.stdout is not None
    program = int(child.stdout.readline())
    child.send_signal(signal.SIGTERM)
    code, out, _ = ended(child)
    assert (code, out) == (3, "told\n")
    with pytest.raises(ProcessLookupError):
        os.kill(program, 0)


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


def test_without_a_driver_the_reason_is_given(sire: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = sire("reserve", "--", "true", LD_LIBRARY_PATH="/nonexistent")
    assert done.returncode in (0, 1), "a machine with a GPU has the library"
    assert done.returncode == 0 or "libnvidia-ml.so.1" in done.stderr


def test_a_probe_says_what_was_needed_and_ends_what_takes_too_long(start: Start) -> None:
    code, out, _ = ended(start("probe", "--json", "--", "sh", "-c", "exit 5"))
    report = json.loads(out)
    assert (code, report["exit_code"], report["peak_bytes"], report["timed_out"]) == (5, 5, 0, False)
    begun = time.monotonic()
    code, out, _ = ended(start("probe", "--json", "--timeout", "0.2", "--", "sleep", "100"))
    assert (code, json.loads(out)["timed_out"], time.monotonic() - begun < 60) == (124, True, True)
