"""Programs without PyTorch, as others write them: what they compute while their memory goes and comes back is what they compute without Sire."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CXX, HERE, ROOT, Workshop, check

sys.path.insert(0, str(ROOT / "tests" / "support"))
from running import line, running

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler; set CXX")

# By hook mode: variables, and whether libsire_driver.so is there.
MODES: dict[str, tuple[dict[str, str], bool]] = {
    "preload": ({}, False),
    "slabs": ({"SIRE_SLABS": "1"}, False),
    "driver": ({}, True),
}


@pytest.fixture(scope="session")
def program(workshop: Workshop, sim_dir: Path):
    """Builds a C++ program that links CUDA and not Sire."""

    def build(source: str) -> Path:
        libraries = ("-Wl,--no-as-needed", f"-L{sim_dir}", "-l:libcudart.so.13", "-l:libcuda.so.1", "-ldl")
        return workshop.fixture(Path(source).stem, HERE / source, *libraries, subdirectory="programs")

    return build


@pytest.fixture(scope="session")
def under(workshop: Workshop, sim_dir: Path, driver_so: Path):
    """The environment of a program that is one region as a whole, in a hook mode; without Sire: of the mode `""`."""

    def environment(mode: str, memory: str) -> dict[str, str]:
        if not mode:
            return workshop.environment(sim_dir, preload=False, SIRE_SIM_MEMORY=memory)
        settings, with_driver = MODES[mode]
        preload = f"{driver_so} {workshop.sire_so}" if with_driver else str(workshop.sire_so)
        return workshop.environment(sim_dir, LD_PRELOAD=preload, SIRE_SIM_MEMORY=memory, SIRE_REGION="program", SIRE_BACKUP="cpu", SIRE_LOG="error", **settings)

    return environment


@pytest.fixture(scope="session")
def command(sire_so: Path) -> Path:
    """`sire`, which is built beside the library."""
    path = sire_so.with_name("sire")
    if not path.is_file():
        pytest.skip("the sire command is not beside the library: `cargo build --release -p sire-cli`")
    return path


def said(environment: dict[str, str], program: Path, *arguments: str) -> str:
    done = check(subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, timeout=120))
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_cxx(program, under, mode: str) -> None:
    built = program("raii.cpp")
    alone = said(under("", "128MiB"), built, "never")
    assert alone.endswith("the end\n")
    for how in ("never", "paused", "left"):
        assert said(under(mode, "128MiB"), built, how) == alone, how


POOLS = ["kept", "ordered", "mapped"]


@pytest.fixture(scope="session")
def uninterrupted(program, under) -> dict[str, str]:
    """What the server says without Sire; by the kind of its pool."""
    answers = {pool: said(under("", "128MiB"), program("inference.cpp"), pool, "never", "0") for pool in POOLS}
    assert len(set(answers.values())) == 1
    assert answers["kept"].startswith("in the middle\n10 layers on the device\n")
    return answers


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_pauses_itself(program, under, uninterrupted: dict[str, str], mode: str, pool: str) -> None:
    # What a program maps by calling the driver itself is heard at driver level alone.
    heard = "1" if mode == "driver" or pool != "mapped" else "0"
    assert said(under(mode, "128MiB"), program("inference.cpp"), pool, "own", heard) == uninterrupted[pool]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_another_process_pauses(program, under, uninterrupted: dict[str, str], command: Path, tmp_path: Path, mode: str, pool: str) -> None:
    tmp_path.chmod(0o700)
    environment = under(mode, "128MiB") | {"SIRE_CONTROL": "1", "XDG_RUNTIME_DIR": str(tmp_path)}
    heard = "1" if mode == "driver" or pool != "mapped" else "0"

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        mine = {"XDG_RUNTIME_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
        return subprocess.run([str(command), *arguments], env=mine, capture_output=True, text=True, timeout=60)

    with running(
        [program("inference.cpp"), pool, "asked", heard], 100, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        pid, middle = str(server.pid), line(server)
        paused = check(ask("pause", pid, "--timeout", "60", "--json"))
        assert json.loads(paused.stdout)["report"]["bytes_moved"] >= 40 << 20
        [device] = json.loads(check(ask("ps", "--json")).stdout)["devices"]
        away = device["total_bytes"] == device["free_bytes"]
        assert away == (heard == "1"), device
        assert server.poll() is None
        check(ask("resume", pid))
        rest, errors = server.communicate("\n", timeout=60)
    assert (server.returncode, errors) == (0, "")
    assert f"{middle}\n{rest}" == uninterrupted[pool]
