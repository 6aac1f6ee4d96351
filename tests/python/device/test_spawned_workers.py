"""A worker that ``multiprocessing`` spawns, in a program that was written for torch_memory_saver.

Nobody can add a line to what such a worker imports; the second distribution serves it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sire

PACKAGE = Path(sire.__file__).resolve().parents[1]
PROGRAM = Path(__file__).resolve().with_name("spawn_program.py")
SIZE = 48 << 20


@pytest.fixture
def second_distribution(tmp_path: Path) -> Path:
    """Where it is installed: by pip, if this environment can build wheels, else as its sources lie."""
    sources = PACKAGE.parent / "compat"
    if importlib.util.find_spec("hatchling") is None:
        return sources / "src"
    target = tmp_path / "installed"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", str(target), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(target.glob("sire_torch_memory_saver-*.dist-info"))
    return target


def test_a_spawned_worker_is_served_by_the_second_distribution(mode: str, second_distribution: Path) -> None:
    if mode == "driver":
        pytest.skip("torch_memory_saver has no such hook mode, so its configure_subprocess does not either")
    # The program itself is not preloaded: what its worker needs comes from configure_subprocess alone.
    clean = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "SIRE_HOOK_MODE")}
    clean["PYTHONPATH"] = os.pathsep.join([str(second_distribution), str(PACKAGE), clean.get("PYTHONPATH", "")])
    command = [sys.executable, str(PROGRAM), mode]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["status"] == 0, done.stderr
    assert seen["module"] == "sire.torch_memory_saver"
    assert seen["mode"] == mode
    assert seen["preloaded"] is (mode == "preload")
    assert seen["same_addresses"]
    assert seen["kept"], "what had a backup is back"
    assert seen["usable"], "what had none can be written again"
    resident, paused, resumed = seen["free"]
    assert paused - resident >= 2 * SIZE, "the memory is the driver's while it is paused"
    assert resumed - resident <= 2 << 20
