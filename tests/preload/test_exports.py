"""What the library shows and needs: the table of exports, the NEEDED list, no symbol versions."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, compile_c


def _tool(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not here")
    return subprocess.run([name, *map(str, arguments)], check=True, capture_output=True, text=True, timeout=300).stdout


def _exports(library: Path) -> list[str]:
    return [line.split()[-1] for line in _tool("nm", "-D", "--defined-only", library).splitlines() if line.strip()]


def _declared() -> set[str]:
    """The functions of the committed header."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", (ROOT / "include" / "sire.h").read_text(), flags=re.S)
    return set(re.findall(r"\b((?:sire|tms|set)_\w+)\s*\(", text))


def _hooked() -> set[str]:
    """The table of interposed functions."""
    source = (ROOT / "cdylib" / "interpose" / "mod.rs").read_text()
    table = source[source.index("\nhooks! {") :]
    return set(re.findall(r"^    (cuda\w+)\(", table, flags=re.M))


PRIVATE = {"sire_driver_answer"}
"""What libsire_driver.so asks, and nobody else."""


def test_the_exports_are_exactly_the_header_and_the_table(sire_so: Path) -> None:
    exports = _exports(sire_so)
    assert len(exports) == len(set(exports))
    assert set(exports) == _declared() | _hooked() | PRIVATE


def test_the_contract_page_names_every_hook() -> None:
    page = (ROOT / "docs" / "abi.md").read_text()
    named = set(re.findall(r"`(cuda\w+)`", page))
    assert _hooked() <= named


def test_exports_carry_no_version(sire_so: Path) -> None:
    # A version node would lose the interposition of `cudaMalloc@libcudart.so.13`.
    assert not [name for name in _exports(sire_so) if "@" in name]
    assert "(VERDEF)" not in _tool("readelf", "-d", sire_so)


def test_nothing_of_cuda_or_cxx_is_needed(sire_so: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", _tool("readelf", "-d", sire_so))
    assert needed, "readelf shows no NEEDED entry at all"
    assert all(re.match(r"(libc|libm|libdl|libpthread|libgcc_s|ld-linux[-\w]*)\.so", name) for name in needed), needed


def test_the_library_stays_loaded(sire_so: Path) -> None:
    assert "NODELETE" in _tool("readelf", "-d", sire_so)


def test_no_constructor_of_ours(sire_so: Path) -> None:
    # Rust's own one (arguments) is a single entry.
    size = re.search(r"\(INIT_ARRAYSZ\)\s+(\d+)", _tool("readelf", "-d", sire_so))
    assert size is None or int(size.group(1)) <= 16


@pytest.mark.parametrize("language", ["c", "cpp"])
def test_the_header_compiles_alone(tmp_path: Path, language: str) -> None:
    source = tmp_path / f"header.{language}"
    source.write_text('#include "sire.h"\nint main(void) { sire_status status = SIRE_STATUS_OK; return status; }\n')
    compile_c(tmp_path / "header", source)


def test_status_names_follow_the_header() -> None:
    text = (ROOT / "include" / "sire.h").read_text()
    numbers = dict(re.findall(r"(SIRE_STATUS_\w+) = (\d+)", text))
    names = dict(re.findall(r'(\w+) = c"(SIRE_STATUS_\w+)"', (ROOT / "cdylib" / "status.rs").read_text()))
    assert sorted(names.values()) == sorted(numbers)
