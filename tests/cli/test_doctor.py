"""`sire doctor`: what it finds, refuses and advises, and that nothing which is broken breaks it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Sire


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    report = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    for finding in report["findings"]:
        assert finding["status"] in ("served", "refused", "note")
        assert finding["detail"]
        if finding["status"] == "refused":
            assert finding["advice"], f"{finding['name']} is refused without a word on what to do"
    return {"usable": report["usable"], "report": report["driver"], **found}


def broken_driver(folder: Path, source: str) -> Path:
    (folder / "driver.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.c")], check=True, timeout=300)
    return folder


def test_a_library_that_is_missing_is_refused(lonely: Sire) -> None:
    done = lonely("doctor", "--json")
    found = findings(done)
    assert (done.returncode, found["usable"]) == (1, False)
    assert found["library"]["status"] == "refused"
    assert "SIRE_LIBRARY" in found["library"]["advice"]


def test_the_software_device_is_served(sire: Sire, library: Path, environment_dir: Path) -> None:
    done = sire("doctor", "--json", "--env", environment_dir, SIRE_LIBRARY=library, SIRE_SIM_MEMORY="1GiB")
    found = findings(done)
    assert (done.returncode, found["usable"]) == (0, True)
    assert found["report"]["software"] is True
    assert found["report"]["devices"][0]["virtual_memory"] is True
    assert found["report"]["devices"][0]["memory_bytes"] == 1 << 30
    assert found["hook"]["status"] == "served"
    assert found["torch"]["status"] == "served"


def test_the_text_says_the_same(sire: Sire, library: Path, environment_dir: Path) -> None:
    done = sire("doctor", "--env", environment_dir, SIRE_LIBRARY=library)
    assert done.returncode == 0
    assert "no GPU is involved" in done.stdout


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("int cuInit(unsigned flags) { return *(volatile int *)8; } int cuDriverGetVersion(int *v) { return 1; }", "signal 11"),
        ("void abort(void); __attribute__((constructor)) static void start(void) { abort(); }", "signal 6"),
        ("int cuInit(unsigned flags) { return 100; } int cuDriverGetVersion(int *v) { *v = 13020; return 0; }", "no device"),
        ("int cuInit(unsigned flags) { return 999; } int cuDriverGetVersion(int *v) { return 1; }", "999"),
        ("int nothing;", "no function"),
        ("#include <stdlib.h>\nint cuInit(unsigned flags) { exit(3); } int cuDriverGetVersion(int *v) { return 1; }", "exit status: 3"),
    ],
)
def test_a_broken_driver_does_not_break_the_doctor(sire: Sire, library: Path, tmp_path: Path, source: str, why: str) -> None:
    folder = broken_driver(tmp_path, source)
    done = sire("doctor", "--json", LD_LIBRARY_PATH=folder, SIRE_LIBRARY=library)
    driver = findings(done)["driver"]
    assert done.returncode == 1
    assert driver["status"] == "refused"
    assert why in driver["detail"], driver


def test_a_device_without_virtual_memory_is_refused(sire: Sire, library: Path, tmp_path: Path) -> None:
    folder = broken_driver(
        tmp_path,
        """
        #include <string.h>
        int cuInit(unsigned flags) { return 0; }
        int cuDriverGetVersion(int *v) { *v = 12040; return 0; }
        int cuDeviceGetCount(int *n) { *n = 1; return 0; }
        int cuDeviceGetName(char *name, int length, int device) { strcpy(name, "GRID V100-8Q"); return 0; }
        int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 8ul << 30; return 0; }
        int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return 0; }
        """,
    )
    done = sire("doctor", "--json", LD_LIBRARY_PATH=folder, SIRE_LIBRARY=library)
    device = findings(done)["device"]
    assert (done.returncode, device["status"]) == (1, "refused")
    assert "virtual-memory" in device["detail"]


def test_another_library_before_sire_is_named(sire: Sire, library: Path, tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text("int sire_abi_version(void) { return 1; }")
    other = tmp_path / "libother.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(other), str(tmp_path / "other.c")], check=True, timeout=300)
    hook = findings(sire("doctor", "--json", SIRE_LIBRARY=other))["hook"]
    assert hook["status"] == "refused"
    assert "cudaMalloc" in hook["detail"]
    assert findings(sire("doctor", "--json", SIRE_LIBRARY=library))["hook"]["status"] == "served"


def test_driver_level_hooks_are_looked_for(sire: Sire, library: Path, tmp_path: Path) -> None:
    if not library.with_name("libsire_driver.so").is_file():
        pytest.skip("libsire_driver.so is not built: scripts/build")
    found = findings(sire("doctor", "--json", SIRE_LIBRARY=library))["driver hooks"]
    assert (found["status"], "sire run --hook-mode driver" in found["detail"]) == ("served", True)
    copy = tmp_path / library.name
    copy.write_bytes(library.read_bytes())
    found = findings(sire("doctor", "--json", SIRE_LIBRARY=copy))["driver hooks"]
    assert (found["status"], "libsire_driver.so" in found["detail"]) == ("note", True)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_served_under_either_name(sire: Sire, library: Path, name: str) -> None:
    segments = findings(sire("doctor", "--json", SIRE_LIBRARY=library, **{name: "expandable_segments:True"}))["segments"]
    assert segments["status"] == "served"
    assert name in segments["detail"]


def test_a_python_that_is_not_there_is_a_note(sire: Sire, library: Path) -> None:
    python = findings(sire("doctor", "--json", "--python", "no-such-python", SIRE_LIBRARY=library))["python"]
    assert python["status"] == "note"
