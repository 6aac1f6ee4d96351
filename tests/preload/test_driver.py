"""Driver-level hooks: who finds which function, and whose memory that makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import FIXTURES, HERE, Workshop, check

WAYS = ["linked", "dlsym", "proc", "proc11", "stream"]


@pytest.fixture(scope="session")
def names_dir(workshop: Workshop) -> Path:
    """A folder whose libcuda.so.1 notes what is called."""
    return workshop.fixture("libcuda.so.1", FIXTURES / "driver.c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic", subdirectory="names").parent


def private(workshop: Workshop, way: int) -> Path:
    return workshop.fixture(f"private_{way}.so", FIXTURES / "private.c", f"-DWAY={way}", "-shared", "-fPIC", workshop.sire_so, workshop.link_runtime, subdirectory="private")


@pytest.fixture(scope="session")
def memory(workshop: Workshop, sim_dir: Path) -> Path:
    """driver_memory.c, which links the driver too."""
    return workshop.program("driver_memory.c", f"-L{sim_dir}", "-l:libcuda.so.1")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("heard", {}),
        ("heard", {"SIRE_HOOK_MODE": "driver"}),
        ("heard", {"SIRE_DRIVER_ALLOW": "driver_na*"}),
        ("heard", {"SIRE_DRIVER_DENY": "libnccl, driver_nam"}),
        ("denied", {"SIRE_DRIVER_ALLOW": "libnccl"}),
        ("denied", {"SIRE_DRIVER_DENY": "driver_names"}),
        ("denied", {"SIRE_DRIVER_ALLOW": "driver_names", "SIRE_DRIVER_DENY": "*names"}),
        ("off", {"SIRE_DISABLE": "1"}),
        ("off", {"SIRE_HOOK_MODE": "preload"}),
        ("off", {"SIRE_HOOK_MODE": "torch"}),
    ],
)
def test_who_gets_which_function(workshop: Workshop, names_dir: Path, driver_so: Path, kind: str, settings: dict[str, str]) -> None:
    program = workshop.program("driver_names.c", runtime=False)
    done = check(workshop.run(program, kind, folders=(names_dir,), extra=settings, LD_PRELOAD=f"{driver_so} {workshop.sire_so}"))
    assert done.stderr == ""


def test_a_list_that_cannot_match_is_refused(workshop: Workshop, sim_dir: Path, memory: Path, driver_so: Path) -> None:
    settings = {"SIRE_DRIVER_DENY": "/usr/lib/libnccl.so", "LD_PRELOAD": f"{driver_so} {workshop.sire_so}"}
    done = workshop.run(memory, "dlsym", "heard", folders=(sim_dir,), extra=settings)
    assert done.returncode == 1
    assert 'SIRE_DRIVER_DENY is "/usr/lib/libnccl.so"; it must be file names' in done.stderr


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["driver first", "driver last"])
def test_memory(workshop: Workshop, sim_dir: Path, memory: Path, driver_so: Path, way: str, order: str) -> None:
    both = [str(driver_so), str(workshop.sire_so)]
    preload = " ".join(both if order == "driver first" else reversed(both))
    settings = {"LD_PRELOAD": preload, "SIRE_SIM_MEMORY": "512MiB", "SIRE_SIM_DEVICES": "2", "SIRE_LOG": "error"}
    check(workshop.run(memory, way, "heard", folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize("way", [1, 2, 3])
@pytest.mark.parametrize("mode", ["local", "global"])
def test_a_library_with_its_own_way_to_the_driver(workshop: Workshop, sim_dir: Path, memory: Path, driver_so: Path, way: int, mode: str) -> None:
    settings = {"LD_PRELOAD": f"{driver_so} {workshop.sire_so}", "SIRE_SIM_MEMORY": "512MiB", "SIRE_LOG": "error"}
    check(workshop.run(memory, "private", str(private(workshop, way)), mode, "heard", folders=(sim_dir,), extra=settings))
    # Without the second library nobody is heard, and all works.
    settings["LD_PRELOAD"] = str(workshop.sire_so)
    check(workshop.run(memory, "private", str(private(workshop, way)), mode, "deaf", folders=(sim_dir,), extra=settings))
