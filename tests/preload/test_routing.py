"""Hooks that serve nothing: who is called, and that Sire is not noticed."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import FIXTURES, Workshop, check


@pytest.fixture(scope="session")
def plugins(workshop: Workshop) -> Path:
    """Two counting runtimes and a library on each."""
    for major in ("12", "13"):
        runtime = workshop.fixture(
            f"libcudart.so.{major}",
            FIXTURES / "runtime.c",
            "-shared",
            "-fPIC",
            f"-Wl,-soname,libcudart.so.{major}",
            subdirectory="plugins",
        )
        workshop.fixture(f"plugin_{major}.so", FIXTURES / "plugin.c", "-shared", "-fPIC", runtime, "-Wl,-rpath,$ORIGIN", subdirectory="plugins")
    return workshop.folder / "plugins"


def test_each_caller_reaches_its_own_runtime(workshop: Workshop, plugins: Path) -> None:
    # The program itself links no runtime: both come in by RTLD_LOCAL, where RTLD_NEXT finds nothing.
    program = workshop.program("routing.c", runtime=False)
    done = check(workshop.run(program, str(plugins), SIRE_LOG="debug"))
    assert done.stderr == ""


def test_libraries_that_bind_to_themselves_first_reach_their_own_runtime(workshop: Workshop, plugins: Path) -> None:
    # RTLD_DEEPBIND: their cudaMalloc is their runtime's, as it would be without Sire.
    check(workshop.run(workshop.program("routing.c", runtime=False), str(plugins), "deepbind"))


def test_a_process_that_has_no_runtime_gets_an_error_not_a_crash(workshop: Workshop) -> None:
    done = check(workshop.run(workshop.program("no_cuda.c", runtime=False)))
    assert "no CUDA runtime that has it is loaded" in done.stderr


@pytest.mark.parametrize("command", [["/bin/true"], ["/bin/sh", "-c", "/bin/echo hello; exit 3"]])
def test_harmless_in_programs_without_cuda(workshop: Workshop, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not here")
    plain = subprocess.run(command, capture_output=True, text=True, env=workshop.environment(preload=False), timeout=300)
    loaded = subprocess.run(command, capture_output=True, text=True, env=workshop.environment(SIRE_REGION="all", SIRE_CHUNK="nonsense"), timeout=300)
    assert (loaded.returncode, loaded.stdout, loaded.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_a_child_starts_about_as_fast(workshop: Workshop) -> None:
    def best(environment: dict[str, str]) -> float:
        times = []
        for _ in range(30):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(["/bin/true"], env=environment, check=True, timeout=300)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            # Processor time: a busy machine makes the child wait, but does not give it more to do.
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(times)

    cost = best(workshop.environment()) - best(workshop.environment(preload=False))
    # A debug build is larger; a release build costs about 0.3 ms.
    assert cost < 0.003, f"loading the library costs {cost * 1e3:.2f} ms"


def test_disabled_means_not_there(workshop: Workshop, plugins: Path) -> None:
    program = workshop.program("routing.c", runtime=False)
    done = check(workshop.run(program, str(plugins), SIRE_DISABLE="1", SIRE_REGION="all"))
    assert done.stderr == ""


def test_a_bad_setting_is_reported_once_and_refused(workshop: Workshop, plugins: Path) -> None:
    program = workshop.program("routing.c", runtime=False)
    done = workshop.run(program, str(plugins), SIRE_CHUNK="many")
    assert done.returncode != 0, "an allocation under refused settings must not pass as if nothing were wrong"
    assert done.stderr.count('SIRE_CHUNK is "many"') >= 1
    assert "512MiB" in done.stderr


def test_the_probe_tells_a_live_hook_from_a_dead_one(workshop: Workshop) -> None:
    program = workshop.program("probe.c", runtime=False)
    check(workshop.run(program, "1"))
    # Linked, not preloaded: the library comes after the runtime in the global order.
    runtime = workshop.link_runtime
    check(workshop.run(program, "0", preload=False, LD_PRELOAD=str(runtime)))


def test_no_setting_is_read_by_a_program_that_never_allocates(workshop: Workshop) -> None:
    environment = workshop.environment(SIRE_LIBCUDA="/nonexistent", SIRE_LOG="debug")
    done = subprocess.run(["/bin/true"], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.environ.get("LD_PRELOAD", "") != environment["LD_PRELOAD"]
