"""What the tests of the command share: the command itself, and ways to run it.

Only the standard library and pytest. `SIRE_COMMAND` names the command; without it the newest build of this checkout is
taken. Tests of a real environment need `SIRE_TEST_ENV`, a directory made by `sire software-env`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

# A job that a script's shell starts in the background begins with SIGINT ignored, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))

if TYPE_CHECKING:
    from outside import Outside

Sire = Callable[..., "subprocess.CompletedProcess[str]"]


def newest(name: str) -> Path | None:
    """The newest build of a product in this checkout."""
    built = [path for kind in ("release", "debug") if (path := TARGET / kind / name).is_file()]
    return max(built, key=lambda path: path.stat().st_mtime).resolve() if built else None


@pytest.fixture(scope="session")
def command() -> Path:
    """The `sire` command."""
    named = os.environ.get("SIRE_COMMAND")
    found = Path(named).resolve() if named else newest("sire")
    if found is None or not found.is_file():
        pytest.skip("the command is not built: scripts/build, or name it in SIRE_COMMAND")
    return found


@pytest.fixture(scope="session")
def library() -> Path:
    """libsire_alloc.so."""
    named = os.environ.get("SIRE_ALLOC_SO")
    found = Path(named).resolve() if named else newest("libsire_alloc.so")
    if found is None or not found.is_file():
        pytest.skip("libsire_alloc.so is not built: scripts/build, or name it in SIRE_ALLOC_SO")
    return found


@pytest.fixture(scope="session")
def stand_in() -> Path:
    """libsire_sim_cuda.so."""
    named = os.environ.get("SIRE_SIM_SO")
    found = Path(named).resolve() if named else newest("libsire_sim_cuda.so")
    if found is None or not found.is_file():
        pytest.skip("libsire_sim_cuda.so is not built: scripts/build, or name it in SIRE_SIM_SO")
    return found


def clean_environment(**variables: str | Path | None) -> dict[str, str]:
    """This process's environment without Sire's and the loader's variables; None removes one more."""
    left_out = {"LD_PRELOAD", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIRE_") and name not in left_out}
    for name, value in variables.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = str(value)
    return environment


@pytest.fixture
def sire(command: Path) -> Sire:
    """Runs the command with arguments and variables."""

    def run(*arguments: str | Path, **variables: str | Path | None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(command), *map(str, arguments)],
            env=clean_environment(**variables),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def environment_dir() -> Path:
    """An environment with PyTorch on the software device."""
    named = os.environ.get("SIRE_TEST_ENV")
    if not named or not (Path(named) / "sire-software-env.json").is_file():
        pytest.skip("no environment of the software device: sire software-env DIR, and name it in SIRE_TEST_ENV")
    return Path(named).resolve()


@pytest.fixture
def lonely(command: Path, tmp_path: Path) -> Sire:
    """The command in a place where it finds no library beside itself."""
    copy = tmp_path / "bin" / "sire"
    copy.parent.mkdir()
    copy.write_bytes(command.read_bytes())
    copy.chmod(0o755)

    def run(*arguments: str | Path, **variables: str | Path | None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(copy), *map(str, arguments)], env=clean_environment(**variables), capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.fixture(scope="module")
def outside(command: Path, library: Path, stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """A program of Sire's, one for each file."""
    from outside import Outside  # which takes its environment from here
    from running import line

    root = tmp_path_factory.mktemp("run")
    root.chmod(0o700)
    outside = Outside(command, library, stand_in, root)
    try:
        assert line(outside.process) == "ready"
        yield outside
    finally:
        outside.close()
