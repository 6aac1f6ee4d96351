"""Finding the library, using one copy of it, and refusing every wrong one with the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sire
from sire import _library

SOURCE = Path(sire.__file__).resolve().parents[1]
Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a stand-in named libsire_alloc.so in a directory of its own."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = Path(__file__).with_name("fake_library.c")

    def compile_one(*defines: str) -> Path:
        path = tmp_path_factory.mktemp("library") / _library.LIBRARY_NAME
        options = [f"-D{each}" for each in defines]
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-w", "-Wl,-Bsymbolic", *options, "-o", str(path), str(source), "-ldl"],
            check=True,
            timeout=300,
        )
        return path

    return compile_one


def python(code: str, **environment: str | Path) -> str:
    """What ``code`` prints in a new process; SireErrors are printed as 'Class: message'."""
    wrapped = f"""import sire
try:
    {code}
except sire.SireError as error:
    print(type(error).__name__, error.status, error, sep=': ')
"""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("SIRE_", "TMS_", "LD_PRELOAD"))
    }
    variables |= {"PYTHONPATH": str(SOURCE)} | {name: str(each) for name, each in environment.items()}
    done = subprocess.run(
        [sys.executable, "-c", wrapped], env=variables, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


USE = "sire.region('a').__enter__(); print(sire.hook_mode)"


def test_sire_library_is_used(build: Build) -> None:
    path = build()
    assert python(USE, SIRE_LIBRARY=path) == "torch"
    assert python("print(sire.library_path())", SIRE_LIBRARY=path) == str(path)
    assert python("print(sire.stats())", SIRE_LIBRARY=path) == "{'version': '0.1.0', 'regions': []}"


def test_statuses_and_messages_come_through_ctypes(build: Build) -> None:
    path = build()
    assert python("sire.pause('x')", SIRE_LIBRARY=path) == "UnknownTagError: 4: the stand-in refuses"
    assert python("print(sire.pause().changed)", SIRE_LIBRARY=path) == "False"


def test_a_preloaded_library_is_found_live(build: Build) -> None:
    path = build()
    assert python(USE, SIRE_LIBRARY=path, LD_PRELOAD=path) == "preload"


def test_a_preload_of_the_same_content_is_the_same_build(build: Build, tmp_path: Path) -> None:
    path = build()
    copy = tmp_path / _library.LIBRARY_NAME
    shutil.copy(path, copy)
    assert python(USE, SIRE_LIBRARY=path, LD_PRELOAD=copy) == "preload"


def test_a_preload_of_another_build_is_refused(build: Build) -> None:
    wanted, preloaded = build(), build('BUILD_ID="fedcba9876543210"')
    said = python(USE, SIRE_LIBRARY=wanted, LD_PRELOAD=preloaded)
    assert said.startswith("VersionMismatchError: 16: ")
    assert str(wanted) in said
    assert str(preloaded) in said
    assert "LD_PRELOAD=$(sire path)" in said


def test_two_loaded_copies_are_refused(build: Build, tmp_path: Path) -> None:
    one, other = build(), build('BUILD_ID="fedcba9876543210"')
    code = f"import ctypes; ctypes.CDLL({str(other)!r}); {USE}"
    assert "several copies" in python(code, SIRE_LIBRARY=one, LD_PRELOAD=one)


def test_a_preload_replaced_on_disk_is_refused(build: Build, tmp_path: Path) -> None:
    path = tmp_path / _library.LIBRARY_NAME
    shutil.copy(build(), path)
    code = f"import os; os.unlink({str(path)!r}); {USE}"
    assert "was replaced or removed" in python(code, SIRE_LIBRARY=path, LD_PRELOAD=path)


def test_a_preload_that_vanished_is_refused(build: Build) -> None:
    said = python(USE, SIRE_LIBRARY=build(), LD_PRELOAD="/gone/libsire_alloc.so")
    assert said.startswith("InactiveError: 15: ")
    assert "/gone/libsire_alloc.so does not exist" in said


@pytest.mark.parametrize(
    ("define", "reason"),
    [
        ("ABI=2", "version 2 of the C interface"),
        ('VERSION="9.9.9"', f"is version 9.9.9, this package is {sire.__version__}"),
        ("INCOMPLETE", "has no function sire_capture_end"),
    ],
)
def test_another_version_is_refused(build: Build, define: str, reason: str) -> None:
    said = python(USE, SIRE_LIBRARY=build(define))
    assert said.startswith("VersionMismatchError: 16: ")
    assert reason in said
    assert "Reinstall" in said


def test_a_recorded_build_id_is_compared(build: Build, tmp_path: Path) -> None:
    package = tmp_path / "sire"
    shutil.copytree(SOURCE / "sire", package, ignore=shutil.ignore_patterns("_native", "__pycache__"))
    native = package / "_native"
    native.mkdir()
    shutil.copy(build(), native)
    (native / "build_id.txt").write_text("0123456789abcdef\n")
    assert python(USE, PYTHONPATH=tmp_path) == "torch"
    assert python("print(sire.library_path())", PYTHONPATH=tmp_path) == str(native / _library.LIBRARY_NAME)
    (native / "build_id.txt").write_text("1111111111111111\n")
    said = python(USE, PYTHONPATH=tmp_path)
    assert "is build 0123456789abcdef, this package was built with 1111111111111111" in said
    other = build('BUILD_ID="fedcba9876543210"')
    assert "is build fedcba9876543210" in python(USE, PYTHONPATH=tmp_path, SIRE_LIBRARY=other)


def test_a_missing_library_says_where_it_was_sought(tmp_path: Path) -> None:
    shutil.copytree(SOURCE / "sire", tmp_path / "sire", ignore=shutil.ignore_patterns("_native"))
    said = python(USE, PYTHONPATH=tmp_path)
    assert said.startswith("LibraryNotFoundError: 15: ")
    assert "SIRE_LIBRARY" in said
    assert "cargo build --release" in said
    said = python(USE, SIRE_LIBRARY="/gone/libsire_alloc.so")
    assert "SIRE_LIBRARY names /gone/libsire_alloc.so, which is not a file" in said


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / _library.LIBRARY_NAME
    path.write_text("not ELF")
    assert "cannot be loaded as Sire's library" in python(USE, SIRE_LIBRARY=path)


def test_mapped_copies_are_read_from_the_maps() -> None:
    maps = """\
7f00-7f01 r-xp 00000000 08:01 123 /opt/a b/libsire_alloc.so
7f01-7f02 r--p 00000000 08:01 123 /opt/a b/libsire_alloc.so
7f02-7f03 r-xp 00000000 08:01 124 /old/libsire_alloc.so (deleted)
7f03-7f04 r-xp 00000000 08:01 125 /opt/notlibsire_alloc.so
7f04-7f05 rw-p 00000000 00:00 0
"""
    assert _library.mapped_copies(maps) == ["/opt/a b/libsire_alloc.so", "/old/libsire_alloc.so (deleted)"]


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys; print('torch' in sys.modules, 'numpy' in sys.modules, sire._library._loaded)"
    assert python(code) == "False False None"


def test_children_are_configured_and_the_environment_is_restored(build: Build) -> None:
    path = build()
    child = f"import sire, os; {USE}; print(os.environ['SIRE_REGION'], os.environ['SIRE_BACKUP'])"
    code = f"""import os, subprocess, sys; before = dict(os.environ)
    with sire.configure_subprocess(region='all', backup='cpu'):
        subprocess.run([sys.executable, '-c', {child!r}], check=True)
    assert dict(os.environ) == before
    print('restored', flush=True)"""
    assert python(code, SIRE_LIBRARY=path).split() == ["preload", "all", "cpu", "restored"]


def test_other_preloads_are_kept(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    path = build()
    monkeypatch.setenv("SIRE_LIBRARY", str(path))
    monkeypatch.setenv("LD_PRELOAD", "/opt/jemalloc.so /old/libsire_alloc.so")
    assert sire.subprocess_environment() == {
        "LD_PRELOAD": f"{path}:/opt/jemalloc.so",
        "SIRE_HOOK_MODE": "preload",
        "SIRE_LIBRARY": str(path),
    }
    with pytest.raises(sire.LibraryNotFoundError, match="driver-level hooks need"):
        sire.subprocess_environment(hook_mode="driver")
    driver = path.with_name("libsire_driver.so")
    driver.write_bytes(b"")
    base = {"LD_PRELOAD": f"{driver}:{path}:/opt/jemalloc.so"}
    assert sire.subprocess_environment(base=base)["LD_PRELOAD"] == f"{path}:/opt/jemalloc.so"
    both = sire.subprocess_environment(base=base, hook_mode="driver")
    assert both["LD_PRELOAD"] == f"{driver}:{path}:/opt/jemalloc.so"
    assert (both["SIRE_HOOK_MODE"], both["SIRE_LIBRARY"]) == ("driver", str(path))
    with pytest.raises(sire.InvalidArgumentError, match="'preload' or 'driver', not 'torch'"):
        sire.subprocess_environment(hook_mode="torch")  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError), sire.configure_subprocess():
        raise ZeroDivisionError
    assert os.environ["LD_PRELOAD"] == "/opt/jemalloc.so /old/libsire_alloc.so"
