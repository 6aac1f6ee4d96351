"""`sire run`: the program becomes this process, with Sire under it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import Sire, clean_environment
from running import line, running, until


def preloaded(pid_maps: str, library: Path) -> bool:
    return str(library) in pid_maps


def test_the_library_is_in_the_program(sire: Sire, library: Path) -> None:
    done = sire("run", "--", "cat", "/proc/self/maps", SIRE_LIBRARY=library)
    assert done.returncode == 0
    assert preloaded(done.stdout, library)


def test_torch_mode_preloads_nothing(sire: Sire, library: Path) -> None:
    done = sire("run", "--hook-mode", "torch", "--", "sh", "-c", "cat /proc/self/maps; env", SIRE_LIBRARY=library)
    maps, _, variables = done.stdout.partition("\n\n")
    assert "SIRE_HOOK_MODE=torch" in done.stdout
    assert f"SIRE_LIBRARY={library}" in done.stdout
    assert "LD_PRELOAD" not in done.stdout
    assert " r-xp " in maps and f" {library}" not in done.stdout.replace(f"SIRE_LIBRARY={library}", ""), variables


def test_driver_mode_preloads_both_libraries_before_all_others(sire: Sire, library: Path, tmp_path: Path) -> None:
    driver = library.with_name("libsire_driver.so")
    if not driver.is_file():
        pytest.skip("libsire_driver.so is not built: scripts/build")
    other = "libm.so.6 libpthread.so.0"
    done = sire("run", "--hook-mode", "driver", "--", "sh", "-c", "cat /proc/self/maps; env", SIRE_LIBRARY=library, LD_PRELOAD=other)
    assert done.returncode == 0
    assert f"LD_PRELOAD={driver}:{library}:libm.so.6:libpthread.so.0\n" in done.stdout
    assert "SIRE_HOOK_MODE=driver\n" in done.stdout
    assert preloaded(done.stdout.partition("LD_PRELOAD")[0], driver)
    # Without its second library there is no such mode, and nothing runs.
    copied = tmp_path / "copy" / library.name
    copied.parent.mkdir()
    copied.write_bytes(library.read_bytes())
    done = sire("run", "--hook-mode", "driver", "--", "touch", tmp_path / "ran", SIRE_LIBRARY=copied)
    assert done.returncode == 1
    assert "driver-level hooks need libsire_driver.so" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_time_slices_are_for_programs_whose_memory_is_heard(sire: Sire, library: Path) -> None:
    done = sire("run", "--time-slice", "2.5", "--group", "ours", "--", "env", SIRE_LIBRARY=library)
    assert "SIRE_TIME_SLICE=2.5\n" in done.stdout
    assert "SIRE_TIME_SLICE_GROUP=ours\n" in done.stdout
    for wrong in (["--time-slice", "0"], ["--time-slice", "2", "--hook-mode", "torch"], ["--group", "ours"]):
        assert sire("run", *wrong, "--", "env", SIRE_LIBRARY=library).returncode == 2


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_the_exit_code_is_the_programs(sire: Sire, library: Path, code: int) -> None:
    assert sire("run", "--", "sh", "-c", f"exit {code}", SIRE_LIBRARY=library).returncode == code


def test_a_program_that_does_not_exist_is_127(sire: Sire, library: Path) -> None:
    done = sire("run", "--", "no-such-program", SIRE_LIBRARY=library)
    assert done.returncode == 127
    assert "no-such-program" in done.stderr


def test_a_file_that_is_no_program_is_126(sire: Sire, library: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    done = sire("run", "--", tmp_path / "text", SIRE_LIBRARY=library)
    assert done.returncode == 126
    assert "not executable" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_the_program_because_it_is_the_process(command: Path, library: Path, number: signal.Signals) -> None:
    with running([command, "run", "--", "sleep", "300"], env=clean_environment(SIRE_LIBRARY=library), stderr=subprocess.DEVNULL) as process:
        name = Path(f"/proc/{process.pid}/comm")
        until("the program has started", lambda: name.read_text() == "sleep\n")
        process.send_signal(number)
        assert process.wait(120) == -number


def test_a_handler_of_the_program_runs(command: Path, library: Path) -> None:
    script = "trap 'echo heard; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    arguments = [command, "run", "--", "sh", "-c", script]
    with running(arguments, env=clean_environment(SIRE_LIBRARY=library), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert line(process) == "ready"
        process.terminate()
        assert line(process) == "heard"
        assert process.wait(120) == 5


def test_standard_input_passes(command: Path, library: Path) -> None:
    done = subprocess.run(
        [str(command), "run", "--", "cat"],
        input="through\n",
        env=clean_environment(SIRE_LIBRARY=library),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "through\n"


def printed(sire: Sire, *arguments: str, **variables: str | Path | None) -> str:
    done = sire("run", "--print-env", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("export ") for line in done.stdout.splitlines())
    return done.stdout


def evaluated(lines: str, name: str, **variables: str) -> str:
    """The value that a POSIX shell gives to a variable after evaluating the lines."""
    script = f'{lines}\nprintf %s "${name}"'
    return subprocess.run(["sh", "-c", script], env={"PATH": os.environ["PATH"], **variables}, capture_output=True, text=True, check=True, timeout=300).stdout


def test_the_printed_environment_can_be_evaluated(sire: Sire, library: Path) -> None:
    lines = printed(sire, "--region", "it's a $tag", "--backup", "disk", SIRE_LIBRARY=library)
    assert evaluated(lines, "LD_PRELOAD") == str(library)
    assert evaluated(lines, "SIRE_REGION") == "it's a $tag"
    assert evaluated(lines, "SIRE_BACKUP") == "disk"
    assert evaluated(lines, "SIRE_HOOK_MODE") == "preload"


def test_the_printed_environment_keeps_what_is_preloaded_elsewhere(sire: Sire, library: Path) -> None:
    lines = printed(sire, SIRE_LIBRARY=library)
    assert evaluated(lines, "LD_PRELOAD", LD_PRELOAD="libmine.so") == f"{library}:libmine.so"


@pytest.mark.parametrize(
    ("arguments", "region", "backup"),
    [
        ([], "", ""),
        (["--backup", "cpu"], "default", "cpu"),
        (["--region", "model/weights"], "model/weights", "cpu"),
        (["--region", "kv", "--backup", "none"], "kv", "none"),
    ],
)
def test_a_process_wide_region_defaults_to_a_backup_on_the_host(sire: Sire, library: Path, arguments: list[str], region: str, backup: str) -> None:
    lines = printed(sire, *arguments, SIRE_LIBRARY=library)
    assert evaluated(lines, "SIRE_REGION") == region
    assert evaluated(lines, "SIRE_BACKUP") == backup


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_region_serves_expandable_segments(sire: Sire, library: Path, name: str) -> None:
    settings = {name: "expandable_segments:True", "SIRE_LIBRARY": library}
    assert sire("run", "--backup", "cpu", "--", "true", **settings).returncode == 0


def test_an_empty_tag_is_refused(sire: Sire, library: Path) -> None:
    done = sire("run", "--region", "", "--", "true", SIRE_LIBRARY=library)
    assert done.returncode == 2
    assert "tag" in done.stderr


def test_a_path_that_ld_preload_cannot_hold_is_refused(sire: Sire, library: Path, tmp_path: Path) -> None:
    copy = tmp_path / "with blank" / "libsire_alloc.so"
    copy.parent.mkdir()
    copy.write_bytes(library.read_bytes())
    done = sire("run", "--", "true", SIRE_LIBRARY=copy)
    assert done.returncode == 1
    assert "LD_PRELOAD cannot hold" in done.stderr
    assert sire("run", "--hook-mode", "torch", "--", "true", SIRE_LIBRARY=copy).returncode == 0


def test_without_a_library_nothing_runs(lonely: Sire, tmp_path: Path) -> None:
    done = lonely("run", "--", "touch", tmp_path / "ran")
    assert done.returncode == 1
    assert not (tmp_path / "ran").exists(), "a program without its hook would be a silent no-op"


def test_the_software_device_needs_an_environment(sire: Sire, library: Path, tmp_path: Path) -> None:
    done = sire("run", "--device", "software", "--", "true", SIRE_LIBRARY=library)
    assert done.returncode == 1
    assert "software-env" in done.stderr
    done = sire("run", "--device", "software", "--env", tmp_path, "--", "true", SIRE_LIBRARY=library)
    assert done.returncode == 1
    assert "not a software-device environment" in done.stderr


def test_a_gpu_that_is_not_there_is_an_error(sire: Sire, library: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    done = sire("run", "--device", "cuda", "--", "true", SIRE_LIBRARY=library)
    assert done.returncode == 1
    assert "no usable CUDA driver" in done.stderr
    warned = sire("run", "--", "true", SIRE_LIBRARY=library)
    assert warned.returncode == 0
    assert "no usable CUDA driver" in warned.stderr


def test_pytorch_pauses_as_a_whole_process(sire: Sire, library: Path, environment_dir: Path) -> None:
    """The README's `sire run --backup cpu -- python train.py`, with a process-wide pause in the middle."""
    script = """
import ctypes, os, torch
tensor = torch.arange(8 << 20, device="cuda")
torch.cuda.synchronize()
free, total = torch.cuda.mem_get_info()
sire = ctypes.CDLL(os.environ["SIRE_LIBRARY"])
address = tensor.data_ptr()
assert sire.sire_pause(None, None, None) == 0
assert torch.cuda.mem_get_info()[0] >= free + (64 << 20), (free, torch.cuda.mem_get_info())
assert sire.sire_resume(None, None, None) == 0
assert tensor.data_ptr() == address
assert torch.equal(tensor.cpu(), torch.arange(8 << 20))
print("paused and resumed")
"""
    python = environment_dir / "bin" / "python"
    done = sire("run", "--backup", "cpu", "--", python, "-c", script, SIRE_LIBRARY=library, SIRE_SIM_MEMORY="1GiB")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "paused and resumed\n"


def test_the_shell_line_of_the_readme(command: Path, library: Path, environment_dir: Path) -> None:
    """Literally LD_PRELOAD=$(sire path) python train.py, with both names on the PATH."""
    path = os.pathsep.join([str(command.parent), str(environment_dir / "bin"), os.environ["PATH"]])
    script = "LD_PRELOAD=$(sire path) python -c 'import torch; print(torch.ones(3, device=\"cuda\").sum().item())'"
    done = subprocess.run(
        ["sh", "-c", script],
        env=clean_environment(PATH=path, SIRE_LIBRARY=library, SIRE_SIM_MEMORY="1GiB"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr
    assert shlex.split(script)[0].startswith("LD_PRELOAD=")
