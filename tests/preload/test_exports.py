"""What the library shows and needs: the table of exports, the NEEDED list, no symbol versions."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import FIXTURES, HERE, ROOT, compile_c


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


WITHOUT_A_DEVICE = {"routing.c", "driver_names.c", "probe.c", "no_cuda.c"}
"""Programs whose runtime or driver is one of fixtures/."""


def test_every_hooked_function_is_called_on_the_device() -> None:
    programs = [path for path in HERE.glob("*.c") if path.name not in WITHOUT_A_DEVICE] + [FIXTURES / "local.c", FIXTURES / "private.c"]
    text = re.sub(r"/\*.*?\*/", "", "\n".join(path.read_text() for path in programs), flags=re.S)
    # per_thread.c's part for the counting runtime.
    text, parts = re.subn(r"^static void arguments\(void\) \{.*?^\}", "", text, flags=re.S | re.M)
    assert parts == 1
    # Functions of the driver are called by their names, or through a table; those for the thread's own stream, through the same one.
    header = (HERE / "driver.h").read_text()
    members = {exported: base for base, exported in re.findall(r"^    X\((\w+), (\w+), \d+, ", header, flags=re.M)}
    members |= {exported: member for member, exported in re.findall(r"^    X\((\w+), \w+, (\w+), \d+, ", header, flags=re.M)}
    assert len(members) > 40
    names = (ROOT / "crates" / "sire-driver-hooks" / "src" / "names.rs").read_text()
    driver = set(re.findall(r"^ {12}(cu\w+)$", names, flags=re.M))

    def is_called(name: str) -> bool:
        member = members.get(name) or members.get(name.removesuffix("_ptsz"))
        return bool(re.search(rf"\b{name}\b", text) or (member and re.search(rf"\bD\.{member}\b", text)))

    hooked = _hooked() | driver
    assert len(hooked) > 60
    assert [name for name in sorted(hooked) if not is_called(name)] == []


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
