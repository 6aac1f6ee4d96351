"""`sire path`: where the library is, and a clear word where there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import Sire, clean_environment


def test_it_prints_the_path_and_nothing_else(sire: Sire, library: Path) -> None:
    done = sire("path", SIRE_LIBRARY=library)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{library}\n", "")


def test_the_library_for_driver_level_hooks_is_beside_the_other(sire: Sire, library: Path, tmp_path: Path) -> None:
    driver = library.with_name("libsire_driver.so")
    if not driver.is_file():
        pytest.skip("libsire_driver.so is not built: scripts/build")
    assert sire("path", "--driver", SIRE_LIBRARY=library).stdout == f"{driver}\n"
    copy = tmp_path / library.name
    copy.write_bytes(library.read_bytes())
    done = sire("path", "--driver", SIRE_LIBRARY=copy)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"which is not at {tmp_path / 'libsire_driver.so'}" in done.stderr


def test_it_finds_the_library_beside_itself(command: Path, sire: Sire) -> None:
    beside = command.parent / "libsire_alloc.so"
    if not beside.is_file():
        pytest.skip("no library beside the command")
    assert sire("path").stdout == f"{beside}\n"


def test_it_finds_the_library_of_the_package_that_installed_it(lonely: Sire, library: Path, tmp_path: Path) -> None:
    native = tmp_path / "lib/python3.11/site-packages/sire/_native"
    native.mkdir(parents=True)
    (native / "libsire_alloc.so").write_bytes(library.read_bytes())
    assert lonely("path").stdout == f"{native / 'libsire_alloc.so'}\n"


def test_without_a_library_it_says_where_it_looked_and_what_to_do(lonely: Sire, tmp_path: Path) -> None:
    done = lonely("path")
    assert done.returncode == 1
    assert done.stdout == "", "LD_PRELOAD=$(sire path) must not get an error message"
    assert f"{tmp_path}/bin/libsire_alloc.so" in done.stderr
    assert "SIRE_LIBRARY" in done.stderr


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "not there"),
        (lambda path: path.mkdir(), "a directory"),
        (lambda path: path.write_text("hello"), "not a shared library"),
    ],
)
def test_a_wrong_named_library_is_never_replaced_by_a_guess(sire: Sire, tmp_path: Path, make, why: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "named.so")
    done = sire("path", SIRE_LIBRARY=tmp_path / "named.so")
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
    assert "SIRE_LIBRARY" in done.stderr


def test_a_closed_pipe_is_no_error(command: Path, library: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{command}' doctor | head -n 0"],
        env=clean_environment(SIRE_LIBRARY=library),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version(sire: Sire) -> None:
    assert sire("--version").stdout == "sire 0.1.0\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["path", "--fast"], ["run", "--device", "abacus", "--", "true"], ["run"], ["software-env"]])
def test_wrong_use_is_exit_code_2(sire: Sire, arguments: list[str]) -> None:
    done = sire(*arguments)
    assert done.returncode == 2
    assert "Usage:" in done.stderr or "possible values" in done.stderr
    assert "panicked" not in done.stderr
