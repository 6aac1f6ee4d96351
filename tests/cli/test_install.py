"""Installing the package from the checkout with pip and cargo, as the README says, and taking it away again."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path

import pytest
from conftest import ROOT, TARGET, clean_environment

SHIM = ROOT / "python-shim"


def pip(python: Path, *arguments: str | Path) -> None:
    """Runs pip; what cargo has built in the checkout already is not built again."""
    done = subprocess.run(
        [str(python), "-m", "pip", *map(str, arguments)],
        env=clean_environment(CARGO_TARGET_DIR=TARGET.resolve(), PIP_DISABLE_PIP_VERSION_CHECK="1"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != 0 and "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("no package index to take the build backend from")
    assert done.returncode == 0, done.stdout + done.stderr


def says(python: Path, shell_line: str) -> str:
    """What a line of shell prints with the environment's programs on the PATH."""
    path = f"{python.parent}:/usr/bin:/bin"
    done = subprocess.run(["/bin/sh", "-c", shell_line], env=clean_environment(PATH=path), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def python(command: Path, tmp_path: Path) -> Path:
    """The Python of a new environment."""
    if shutil.which("cargo") is None:
        pytest.skip("cargo is not on the PATH")
    venv.create(tmp_path / "environment", with_pip=True, symlinks=True)
    return tmp_path / "environment" / "bin" / "python"


def files(python: Path) -> set[Path]:
    return {path for path in python.parents[1].rglob("*") if "__pycache__" not in path.parts}


MODE = "'import sire._hooks as hooks; print(hooks.hook_mode())'"


def test_an_installation_works_and_leaves_nothing(python: Path) -> None:
    before = files(python)
    pip(python, "install", SHIM)
    library = says(python, "sire path")
    assert Path(library).is_relative_to(python.parents[1])
    assert says(python, "python -c 'import sire; print(sire.library_path())'") == library
    assert says(python, f"LD_PRELOAD=$(sire path) python -c {MODE}") == "preload"
    assert says(python, f"python -c {MODE}") == "torch"
    assert says(python, f"sire run -- python -c {MODE} 2>/dev/null") == "preload"
    pip(python, "uninstall", "--yes", "sire-alloc")
    assert files(python) == before


def test_an_editable_installation_uses_the_checkout(python: Path) -> None:
    pip(python, "install", "--editable", SHIM)
    origin = says(python, "python -c 'import sire; print(sire.__file__)'")
    assert Path(origin).is_relative_to(SHIM)
    if TARGET.resolve() == ROOT / "target":
        library = says(python, "python -c 'import sire; print(sire.library_path())'")
        assert Path(library).is_relative_to(ROOT / "target")
        assert says(python, f"LD_PRELOAD={library} python -c {MODE}") == "preload"
    assert not (SHIM / "src" / "sire" / "_native").exists()
