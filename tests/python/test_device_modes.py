"""Runs ``device/`` with real PyTorch: every file in a process of its own, in each of five configurations.

These are the hook modes preload, torch, allocator and driver, and preload with PyTorch's expandable segments.

The interpreter must have PyTorch and a device, real or the software one; otherwise these are skipped and say so.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import sire

HERE = Path(__file__).resolve().parent
SMALL = {"test_layer_plan.py", "test_memory_manager.py", "test_slices.py"}
"""They run models that are twice as large as their device."""
ONCE = {
    "test_check.py",
    "test_commits.py",
    "test_control.py",
    "test_distributed.py",
    "test_gpu_lock.py",
    "test_layer_plan.py",
    "test_lora.py",
    "test_slices.py",
    "test_memory_settings.py",
    "test_units.py",
    "test_wrapping.py",
}
"""Nothing in them depends on how allocations are heard, beyond what test_memory_manager.py tries in both modes."""
HEARING_ALL = {"test_driver.py": "driver", "test_time_slices.py": "preload"}
"""They need a hook mode that hears of every allocation: one is enough, and the others run them on request."""
SHORT_OF_MEMORY = {"test_sequences.py": {"SIRE_SIM_MEMORY": "64MiB", "SIRE_HOST_LIMIT": "24MiB"}}
"""Their device and what backups may take are so small that calls fail."""
FILES = sorted(path.name for path in (HERE / "device").glob("test_*.py"))
# Where the hook mode allocator differs; the rest runs in it on request (scripts/test --hook-mode allocator).
DIFFERENT = (
    "test_graphs.py",
    "test_live_blocks.py",
    "test_pause.py",
    "test_regions.py",
    "test_sequences.py",
    "test_switch.py",
    "test_training.py",
)
# Whose memory it is depends on who heard of it, in each of the five.
EVERYWHERE = ("test_peers.py", "test_threads.py")
# What driver-level hooks could disturb: import and start of PyTorch, its own way to the driver, graphs.
AT_DRIVER_LEVEL = ("test_driver.py", "test_graphs.py", "test_pause.py", "test_segments.py", "test_training.py")
# What segments that grow could disturb; test_segments.py switches them on by itself.
WITH_EXPANDABLE = (
    "test_graphs.py",
    "test_live_blocks.py",
    "test_pause.py",
    "test_regions.py",
    "test_sequences.py",
    "test_training.py",
)


def runs() -> list[tuple[str, str]]:
    """(mode, file): those that were asked for, else two modes with nearly all files and the others with some."""
    wanted = os.environ.get("SIRE_TEST_HOOK_MODES")
    if wanted:
        return [(mode, file) for mode in wanted.split(",") for file in FILES]
    both = [(mode, file) for file in FILES for mode in ("torch", "preload") if HEARING_ALL.get(file, mode) == mode]
    everywhere = [(mode, file) for mode, file in both if mode == "torch" or file not in ONCE]
    others = {"allocator": DIFFERENT, "driver": AT_DRIVER_LEVEL, "preload-expandable": WITH_EXPANDABLE}
    return everywhere + [(mode, file) for mode, files in others.items() for file in (*files, *EVERYWHERE)]


RUNS = runs()


@functools.cache
def why_not() -> str | None:
    """Why the device tests cannot run here; None if they can."""
    try:
        sire.library_path()
    except sire.SireError as error:
        return str(error)
    code = "import torch; torch.cuda.init(); print(torch.cuda.get_device_name())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment(), timeout=300
    )
    return None if done.returncode == 0 else f"no PyTorch with a device: {done.stderr.strip().splitlines()[-1]}"


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with a small software device, should it be one."""
    variables = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "SIRE_HOOK_MODE")}
    variables["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(sire.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
    )
    variables.setdefault("SIRE_SIM_MEMORY", "2GiB")
    return variables | extra


@pytest.mark.parametrize(("mode", "file"), RUNS)
def test_on_device(mode: str, file: str) -> None:
    reason = why_not()
    if reason is not None:
        if os.environ.get("SIRE_TEST_REQUIRE_DEVICE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    hooks = mode.removesuffix("-expandable")
    variables = environment(SIRE_TEST_MODE=mode, SIRE_HOOK_MODE=hooks)
    if hooks != mode:
        # PyTorch before 2.10 reads only the older name, and does not say so (pytorch#183387).
        old = tuple(int(part) for part in version("torch").split(".")[:2]) < (2, 10)
        variables["PYTORCH_CUDA_ALLOC_CONF" if old else "PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if file in SMALL:
        variables["SIRE_SIM_MEMORY"] = "64MiB"
    variables |= SHORT_OF_MEMORY.get(file, {})
    if file == "test_loop.py":
        # It compares with the kernel's count, which knows only pages that were written.
        variables["SIRE_SIM_POISON"] = "full"
    if hooks in ("preload", "driver"):
        variables |= sire.subprocess_environment(base=variables, hook_mode=hooks)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        str(HERE / "device" / file),
    ]
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{file} in mode {mode}:\n{done.stdout}"
    assert file not in SMALL or " skipped" not in done.stdout, f"the device was not small for {file}:\n{done.stdout}"
