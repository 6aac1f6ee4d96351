"""The wheel: what is in it, how it is tagged, that it installs, works and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "python-shim"


def pip(*arguments: str | Path, python: Path | str = sys.executable, **variables: str | Path) -> str:
    """Runs pip; with the build backend of this interpreter if it has one, else pip fetches it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SIRE_")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        env=environment | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=900,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout)
    return done.stdout


def wheel(source: Path, into: Path, **variables: str | Path) -> Path:
    """Builds the wheel of ``source``."""
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    into.mkdir(exist_ok=True)
    pip("wheel", "--no-deps", *isolation, "--wheel-dir", into, source, **variables)
    [built] = into.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for what cargo builds."""
    directory = tmp_path_factory.mktemp("products")
    source = str(Path(__file__).with_name("fake_library.c"))
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    for library in ("libsire_alloc.so", "libsire_driver.so"):
        output = str(directory / library)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-w", "-Wl,-Bsymbolic", "-o", output, source, "-ldl"],
            check=True,
            timeout=900,
        )
    command = directory / "sire"
    main = (
        '#include <stdio.h>\nint main(int n, char **v) { printf("the command %s\\n", n > 1 ? v[1] : ""); return 0; }\n'
    )
    subprocess.run([compiler, "-x", "c", "-o", str(command), "-"], input=main, text=True, check=True, timeout=900)
    return directory


@pytest.fixture(scope="session")
def built(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the package around the stand-ins."""
    try:
        return wheel(SHIM, tmp_path_factory.mktemp("wheel"), SIRE_PREBUILT=products)
    except RuntimeError as error:
        if "hatchling" in str(error) and "No matching distribution" in str(error):
            pytest.skip("hatchling is neither installed nor to be had")
        raise


def test_the_wheel_holds_library_command_and_types(built: Path) -> None:
    assert built.name.startswith("sire_alloc-0.1.0-py3-none-linux_")
    names = zipfile.ZipFile(built).namelist()
    assert "sire/_native/libsire_alloc.so" in names
    assert "sire/_native/libsire_driver.so" in names
    assert "sire/_native/build_id.txt" in names
    assert "sire/py.typed" in names
    assert "sire/torch_memory_saver/hooks/mode_preload.py" in names
    assert "sire_alloc-0.1.0.data/scripts/sire" in names
    assert not [name for name in names if name.endswith(".pyc")]
    assert zipfile.ZipFile(built).read("sire/_native/build_id.txt") == b"0123456789abcdef\n"
    assert not (SHIM / "src" / "sire" / "_native").exists()


def test_it_installs_works_and_leaves_nothing(built: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    before = {path for path in environment.rglob("*") if "__pycache__" not in path.parts}
    pip("install", "--no-index", "--no-deps", built, python=python)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SIRE_", "PYTHONPATH"))}
    code = "import sire; sire.hook_mode = 'torch'; print(sire.library_path()); sire.region('a').__enter__()"
    path = subprocess.run(
        [python, "-c", code], env=clean, capture_output=True, text=True, check=True, timeout=900
    ).stdout.strip()
    assert Path(path).is_relative_to(environment)
    said = subprocess.run(
        [environment / "bin" / "sire", "works"], capture_output=True, text=True, check=True, timeout=900
    ).stdout
    assert said == "the command works\n"
    pip("uninstall", "--yes", "sire-alloc", python=python)
    after = {path for path in environment.rglob("*") if "__pycache__" not in path.parts}
    assert after == before


def test_the_second_distribution(tmp_path: Path) -> None:
    try:
        built = wheel(SHIM / "compat", tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error)[-200:])
    names = zipfile.ZipFile(built).namelist()
    assert built.name == "sire_torch_memory_saver-0.1.0-py3-none-any.whl"
    assert "torch_memory_saver/__init__.py" in names
    metadata = zipfile.ZipFile(built).read("sire_torch_memory_saver-0.1.0.dist-info/METADATA").decode()
    assert "Requires-Dist: sire-alloc==0.1.0" in metadata


def test_without_cargo_the_build_says_what_it_needs(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    with pytest.raises(RuntimeError, match="'cargo' is not on the PATH"):
        wheel(SHIM, tmp_path, PATH="/nowhere")


def test_incomplete_products_are_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    with pytest.raises(RuntimeError, match=r"has no file libsire_alloc\.so"):
        wheel(SHIM, tmp_path / "wheel", SIRE_PREBUILT=tmp_path)


def test_the_glibc_floor_is_read_and_enforced(products: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    script, library = SHIM / "glibc_floor.py", products / "libsire_alloc.so"

    def floor(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, library, *arguments], capture_output=True, text=True, check=False, timeout=900
        )

    assert floor().returncode == 0
    assert "libsire_alloc.so: GLIBC_2." in floor().stdout
    assert floor("--at-most", "9.99").returncode == 0
    too_new = floor("--at-most", "2.0")
    assert too_new.returncode == 1
    assert "needs a newer glibc than 2.0" in too_new.stderr
