"""C programs on the software device, through the library's outside only."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import FIXTURES, Workshop, check


@pytest.mark.parametrize("backup", ["none", "host", "disk"])
def test_round_trip(workshop: Workshop, sim_dir: Path, tmp_path: Path, backup: str) -> None:
    check(workshop.run(workshop.program("round_trip.c"), backup, folders=(sim_dir,), SIRE_SIM_MEMORY="1GiB", SIRE_DISK_DIR=str(tmp_path)))
    assert list(tmp_path.iterdir()) == [], "a backup file was left behind"


def test_bad_input(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("bad_input.c", "-lm"), folders=(sim_dir,), SIRE_SIM_MEMORY="1GiB", SIRE_LOG="off"))


def test_out_of_memory(workshop: Workshop, sim_dir: Path) -> None:
    done = check(workshop.run(workshop.program("out_of_memory.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB"))
    assert "warning" not in done.stderr, "running short is PyTorch's everyday; it must not be logged as trouble"


def test_capture(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("capture.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB"))


def test_what_a_capture_records_is_left_to_cuda(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("recorded.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB"))


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_capture_beside(workshop: Workshop, sim_dir: Path, strict: str) -> None:
    settings = {"SIRE_SIM_MEMORY": "512MiB", "SIRE_HOST_RESERVE": "256MiB", "SIRE_SIM_STRICT_CAPTURE": strict}
    check(workshop.run(workshop.program("capture_beside.c"), folders=(sim_dir,), **settings))


def test_forked_child(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("fork_child.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", SIRE_LOG="off"))


def test_threads(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("threads.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", SIRE_LOG="error"))


def test_ranges(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("ranges.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB"))


def test_callers(workshop: Workshop, sim_dir: Path) -> None:
    program = workshop.program("callers.c", f"-L{sim_dir}", "-l:libcuda.so.1", "-lpthread")
    check(workshop.run(program, "runtime", folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB", SIRE_LOG="off"))


def test_dead_ranges(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("dead_ranges.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", SIRE_LOG="off"))


def test_switch(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("switch.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="128MiB", SIRE_LOG="off"))


def test_a_system_without_threads(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("no_threads.c", "-rdynamic"), folders=(sim_dir,), SIRE_SIM_MEMORY="96MiB", SIRE_CHUNK="4MiB", SIRE_LOG="off"))


def test_pre_copy(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("pre_copy.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", SIRE_LOG="off"))


def test_lazy(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("lazy.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="128MiB", SIRE_LOG="off"))


def test_slabs(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("slabs.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="128MiB", SIRE_LOG="off", SIRE_SLABS="1"))


@pytest.mark.parametrize(("count", "backup"), [(1_000_000, 0), (50_000, 1)])
def test_very_many_live_blocks(workshop: Workshop, sim_dir: Path, count: int, backup: int) -> None:
    # No bound on time but the program's: what grows with the square of the count does not end within it.
    settings = {"SIRE_SIM_MEMORY": "1GiB", "SIRE_SIM_POISON": "off", "SIRE_LOG": "error"}
    done = check(workshop.run(workshop.program("blocks.c"), str(count), str(backup), folders=(sim_dir,), timeout=300, extra=settings))
    assert done.stdout.startswith(f"{count} live, ")


def test_what_is_refused_is_said(workshop: Workshop, sim_dir: Path, tmp_path: Path) -> None:
    done = check(workshop.run(workshop.program("refusals.c"), str(tmp_path), folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB", SIRE_SIM_DEVICES="2"))
    said = [
        "nothing is allocated to pool (77, 78)",
        "there is no private pool (77, 78)",
        "an allocation failed: -5 bytes were asked for",
        "-7 bytes were asked for (no C++ runtime is loaded that could raise it)",
        "a free failed: ",
        "the CUDA runtime does not know it either",
        "peer access to regions on device 0 is unknown",
        "what device 1 may do with regions on device 0 could not be set",
        "the reservation of 4194304 bytes on ",
        " has no fence: ",
    ]
    assert [words for words in said if words not in done.stderr] == [], done.stderr


def test_wrong_use(workshop: Workshop, sim_dir: Path, tmp_path: Path) -> None:
    settings = {"SIRE_SIM_MEMORY": "256MiB", "SIRE_LOG": "off", "XDG_RUNTIME_DIR": str(tmp_path)}
    check(workshop.run(workshop.program("said.c", "-lm"), str(tmp_path), folders=(sim_dir,), extra=settings))


def test_what_clients_are_refused_is_said(workshop: Workshop, sim_dir: Path, tmp_path: Path) -> None:
    settings = {"SIRE_SIM_MEMORY": "64MiB", "SIRE_LOG": "off", "XDG_RUNTIME_DIR": str(tmp_path)}
    check(workshop.run(workshop.program("asked.c"), folders=(sim_dir,), extra=settings))


def test_progress(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("progress.c", "-lm"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", SIRE_LOG="off"))


def local_library(workshop: Workshop, major: str) -> Path:
    """fixtures/local.c on the runtime of this version."""
    runtime = workshop.fixture(f"libcudart.so.{major}", FIXTURES / "runtime.c", "-shared", "-fPIC", f"-Wl,-soname,libcudart.so.{major}", subdirectory="local")
    return workshop.fixture(f"local_{major}.so", FIXTURES / "local.c", "-shared", "-fPIC", runtime, workshop.sire_so, subdirectory="local-libraries")


@pytest.mark.parametrize("major", ["12", "13"])
def test_a_runtime_that_was_loaded_locally(workshop: Workshop, sim_dir: Path, major: str) -> None:
    library = local_library(workshop, major)
    check(workshop.run(workshop.program("local_load.c", runtime=False), str(library), folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB"))


@pytest.mark.parametrize("second", ["the device's own", "another"])
@pytest.mark.parametrize("order", [("12", "13"), ("13", "12")])
def test_two_runtimes_that_were_loaded_locally(workshop: Workshop, sim_dir: Path, second: str, order: tuple[str, str]) -> None:
    # The device's own is one library under two names; another is a library, with functions, of its own.
    folders = [sim_dir]
    if second == "another":
        runtime = workshop.fixture(
            "libcudart.so.12", FIXTURES / "second.c", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.12", "-Wl,-Bsymbolic", subdirectory="second"
        )
        folders.insert(0, runtime.parent)
    libraries = [str(local_library(workshop, major)) for major in order]
    done = check(workshop.run(workshop.program("local_load.c", runtime=False), *libraries, folders=tuple(folders), SIRE_SIM_MEMORY="256MiB"))
    assert done.stdout == f"second runtime: {int(second == 'another')}\n"


def test_peers(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("peers.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB", SIRE_SIM_DEVICES="2"))


def test_peers_of_pools_and_mappings(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("pool_peers.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB", SIRE_SIM_DEVICES="2"))


def test_pools_of_the_program(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("pools.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB", SIRE_SIM_DEVICES="2", SIRE_LOG="off"))


def test_per_thread_default_streams(workshop: Workshop, sim_dir: Path) -> None:
    program = workshop.program("per_thread.c")
    check(workshop.run(program, "device", folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB", SIRE_LOG="off"))
    check(workshop.run(program, "arguments", folders=(workshop.link_runtime.parent,)))


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_memory_of_another_process(workshop: Workshop, sim_dir: Path, tmp_path: Path, end: str) -> None:
    settings = {"SIRE_SIM_DIR": str(tmp_path), "SIRE_SIM_MEMORY": "256MiB", "SIRE_LOG": "off"}
    check(workshop.run(workshop.program("shared.c"), end, folders=(sim_dir,), extra=settings))


def test_memory_that_is_handed_out(workshop: Workshop, sim_dir: Path) -> None:
    done = check(workshop.run(workshop.program("handed_out.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB"))
    assert "stay on the device: a handle of it was retained" in done.stderr
    assert "stay on the device: it is bound to a multicast object" in done.stderr
    assert "stay on the device: a dma-buf handle of it was made" in done.stderr
    assert "cudaIpcGetMemHandle cannot hand such memory to another process" in done.stderr


@pytest.mark.parametrize("dummy", ["1", "0"])
def test_a_stray_copy_into_paused_memory(workshop: Workshop, sim_dir: Path, dummy: str) -> None:
    settings = {"SIRE_DUMMY": dummy, "SIRE_SIM_MEMORY": "256MiB", "SIRE_LOG": "off"}
    check(workshop.run(workshop.program("stray.c"), dummy, folders=(sim_dir,), extra=settings))


def test_only_the_devices_in_use_get_a_context(workshop: Workshop, sim_dir: Path) -> None:
    program = workshop.program("second_device.c")
    check(workshop.run(program, folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB", SIRE_SIM_DEVICES="2"))


def test_regions_that_take_one_device(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("one_device.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="256MiB", SIRE_SIM_DEVICES="2"))


def test_a_device_that_is_visible_by_its_uuid(workshop: Workshop, sim_dir: Path) -> None:
    program, settings = workshop.program("visible.c"), {"SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_DEVICES": "2"}
    second = check(workshop.run(program, "name", folders=(sim_dir,), extra=settings)).stdout.strip()
    settings["CUDA_VISIBLE_DEVICES"] = second
    assert check(workshop.run(program, "only", folders=(sim_dir,), extra=settings)).stdout.strip() == second


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("question", ["cuMemGetAllocationGranularity", "cuDeviceGetAttribute"])
def test_a_broken_device_leaves_the_others_alone(workshop: Workshop, sim_dir: Path, broken: int, question: str) -> None:
    # Four attributes are asked of each device.
    nth = 1 + broken * (4 if question == "cuDeviceGetAttribute" else 1)
    settings = {"SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_DEVICES": "2", "SIRE_SIM_FAULTS": f"{question}#{nth}=error:999"}
    program = workshop.program("broken_device.c")
    check(workshop.run(program, str(broken), f"device {broken} cannot be used", folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize("function", ["cuMemUnmap", "cuMemRelease", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemcpyDtoHAsync_v2"])
def test_one_driver_call_fails(workshop: Workshop, sim_dir: Path, function: str) -> None:
    done = check(workshop.run(workshop.program("faults.c"), function, folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", SIRE_LOG="off"))
    assert int(done.stdout.split()[0]) > 0 or function == "cuMemRelease", "the fault plan reached nothing"


@pytest.mark.parametrize("backup", [1, 2])
def test_killed_in_the_middle(workshop: Workshop, sim_dir: Path, tmp_path: Path, backup: int) -> None:
    program, environment, disk = workshop.program("killed.c"), tmp_path / "environment", tmp_path / "disk"
    environment.mkdir()
    disk.mkdir()
    settings = {"SIRE_SIM_MEMORY": "512MiB", "SIRE_SIM_DIR": str(environment), "SIRE_DISK_DIR": str(disk)}
    done = workshop.run(program, str(backup), folders=(sim_dir,), extra=settings)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check(workshop.run(program, "after", folders=(sim_dir,), extra=settings))
    assert sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) == 0, "a dead process' backup was left behind"


def test_backups_on_a_slow_disk_are_compressed_where_that_saves_bytes(workshop: Workshop, sim_dir: Path, tmp_path: Path) -> None:
    settings = {"SIRE_DISK_COMPRESS": "1", "SIRE_DISK_DIR": str(tmp_path)}
    check(workshop.run(workshop.program("slow_disk.c"), folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", extra=settings))


def test_tms(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("tms.c"), "api", folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", SIRE_LOG="off"))


def test_tms_environment(workshop: Workshop, sim_dir: Path) -> None:
    settings = {"TMS_INIT_ENABLE": "1", "TMS_INIT_ENABLE_CPU_BACKUP": "true", "TMS_RETAIN_CPU_BACKUP": "yes", "TMS_INIT_CPU_BACKUP_BACKEND": "mmap"}
    check(workshop.run(workshop.program("tms.c"), "init", folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", extra=settings))


def test_tms_disk_environment(workshop: Workshop, sim_dir: Path, tmp_path: Path) -> None:
    program = workshop.program("tms.c")
    settings = {"TMS_INIT_ENABLE": "1", "TMS_INIT_ENABLE_DISK_BACKUP": "1", "SIRE_SIM_MEMORY": "512MiB", "TMS_DISK_BACKUP_CHUNK_MB": "8"}
    check(workshop.run(program, "disk", folders=(sim_dir,), TMS_DISK_BACKUP_DIR=str(tmp_path), extra=settings))
    assert list(tmp_path.iterdir()) == []
    # The directory is the one that is used: where none can be, the pause fails and says so.
    occupied = tmp_path / "file"
    occupied.write_text("")
    refused = workshop.run(program, "disk", folders=(sim_dir,), TMS_DISK_BACKUP_DIR=str(occupied), extra=settings)
    assert refused.returncode == 1
    assert str(occupied) in refused.stderr
    settings["TMS_DISK_BACKUP_CHUNK_MB"] = "0"
    refused = workshop.run(program, "disk", folders=(sim_dir,), extra=settings)
    assert refused.returncode == 1
    assert "TMS_DISK_BACKUP_CHUNK_MB" in refused.stderr


@pytest.mark.parametrize("kind", ["exportable", "private"])
def test_properties_of_physical_memory(workshop: Workshop, sim_dir: Path, kind: str) -> None:
    settings = {"SIRE_EXPORTABLE": "1" if kind == "exportable" else "0", "SIRE_SIM_MEMORY": "256MiB"}
    check(workshop.run(workshop.program("sharing.c"), kind, folders=(sim_dir,), extra=settings))


def test_a_device_without_descriptors(workshop: Workshop, sim_dir: Path) -> None:
    # SIRE_EXPORTABLE=1 asked for them without looking: the device "failed at the start", with the driver's words about a granularity, and nobody said
    # what to unset.
    settings = {"SIRE_SIM_DESCRIPTORS": "0", "SIRE_SIM_MEMORY": "256MiB"}
    program = workshop.program("sharing.c")
    check(workshop.run(program, "private", folders=(sim_dir,), extra=settings))
    refused = workshop.run(program, "exportable", folders=(sim_dir,), extra=settings | {"SIRE_EXPORTABLE": "1"})
    assert refused.returncode == 1
    assert "device 0 cannot hand out memory as a file descriptor, which SIRE_EXPORTABLE=1 asks for; unset it" in refused.stderr, refused.stderr


@pytest.mark.parametrize("slabs", ["0", "1"])
def test_what_is_registered_for_others(workshop: Workshop, sim_dir: Path, slabs: str) -> None:
    settings = {"SIRE_EXPORTABLE": "1", "SIRE_CHUNK": "4MiB", "SIRE_SLABS": slabs, "SIRE_SIM_MEMORY": "256MiB", "SIRE_LOG": "error"}
    check(workshop.run(workshop.program("registered.c"), folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize(("backup", "discarded"), [("cpu", 0), ("none", 5 << 20)])
def test_the_log_names_what_was_discarded(workshop: Workshop, sim_dir: Path, backup: str, discarded: int) -> None:
    settings = {"SIRE_REGION": "r", "SIRE_BACKUP": backup, "SIRE_LOG": "info", "SIRE_SIM_MEMORY": "512MiB"}
    done = workshop.run(workshop.program("process_wide.c"), "r", folders=(sim_dir,), extra=settings)
    found = re.search(r'sire: paused "r": 1 regions changed, (\d+) bytes given back, (\d+) copied to backups, (\d+) discarded', done.stderr)
    assert found, done.stderr
    assert int(found[1]) >= 5 << 20
    assert (int(found[2]) > 0) == (backup == "cpu")
    assert int(found[3]) >= discarded
    assert (int(found[3]) == 0) == (discarded == 0)


def test_a_backup_that_cannot_be_pinned_is_said(workshop: Workshop, sim_dir: Path) -> None:
    settings = {"SIRE_SIM_MEMORY": "1GiB", "SIRE_SIM_FAULTS": "cuMemHostRegister_v2=error:801"}
    done = check(workshop.run(workshop.program("round_trip.c"), "host", folders=(sim_dir,), extra=settings))
    assert done.stderr.count("sire: warning: backups use pageable host memory") == 1, done.stderr


def test_a_full_pipe_stops_nobody(workshop: Workshop, sim_dir: Path) -> None:
    # Standard error that nobody reads: a message is lost rather than an allocation delayed.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    environment = workshop.environment(SIRE_REGION="r", SIRE_LOG="debug", SIRE_SIM_MEMORY="512MiB", LD_LIBRARY_PATH=str(sim_dir))
    done = subprocess.run([str(workshop.program("process_wide.c")), "r"], env=environment, stderr=writer, timeout=60)
    os.close(reader)
    os.close(writer)
    assert done.returncode == 0


@pytest.mark.parametrize("variables", [{"SIRE_REGION": "all"}, {"TMS_INIT_ENABLE": "1"}])
def test_a_process_wide_pause_past_which_memory_goes_is_refused(workshop: Workshop, sim_dir: Path, variables: dict[str, str]) -> None:
    settings = variables | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "SIRE_SIM_MEMORY": "512MiB", "SIRE_HOOK_MODE": "torch"}
    check(workshop.run(workshop.program("process_wide.c"), "blind", folders=(sim_dir,), extra=settings))


def test_a_library_that_is_switched_off_says_so(workshop: Workshop, sim_dir: Path) -> None:
    check(workshop.run(workshop.program("process_wide.c"), "disabled", folders=(sim_dir,), SIRE_DISABLE="1"))


@pytest.mark.parametrize("kind", ["regions", "odd", "refused", "off"])
def test_segments(workshop: Workshop, sim_dir: Path, kind: str) -> None:
    settings = {"SIRE_SIM_MEMORY": "512MiB", "SIRE_LOG": "off", "SIRE_DISABLE": "1" if kind == "off" else "0"}
    check(workshop.run(workshop.program("segments.c"), kind, folders=(sim_dir,), extra=settings))


def test_segments_outside_regions_and_in_hook_mode_torch(workshop: Workshop, sim_dir: Path) -> None:
    program = workshop.program("segments.c")
    check(workshop.run(program, "outside", folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB"))
    check(workshop.run(program, "off", folders=(sim_dir,), SIRE_SIM_MEMORY="512MiB", SIRE_HOOK_MODE="torch"))


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_of_a_whole_process(workshop: Workshop, sim_dir: Path, variable: str) -> None:
    settings = {"SIRE_REGION": "whole", "SIRE_SIM_MEMORY": "11MiB", variable: "expandable_segments:True", "SIRE_LOG": "off"}
    check(workshop.run(workshop.program("segments.c"), "process", folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize("backup", [None, "cpu", "disk"])
def test_process_wide_region(workshop: Workshop, sim_dir: Path, tmp_path: Path, backup: str | None) -> None:
    settings = {"SIRE_REGION": "whole/program", "SIRE_SIM_MEMORY": "512MiB", "SIRE_DISK_DIR": str(tmp_path)}
    if backup:
        settings["SIRE_BACKUP"] = backup
    check(workshop.run(workshop.program("process_wide.c"), "whole/program", folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize(
    ("variables", "owned"),
    [
        ({"SIRE_HOOK_MODE": "torch"}, False),
        ({"TMS_HOOK_MODE": "torch"}, False),
        ({"TMS_HOOK_MODE": "torch", "SIRE_HOOK_MODE": "preload"}, True),
    ],
)
def test_hooks_serve_regions_only_in_their_mode(workshop: Workshop, sim_dir: Path, variables: dict[str, str], owned: bool) -> None:
    settings = variables | {"SIRE_REGION": "whole", "SIRE_SIM_MEMORY": "512MiB"}
    done = workshop.run(workshop.program("process_wide.c"), "whole", folders=(sim_dir,), extra=settings)
    assert (done.returncode == 0) == owned
    assert owned or "sire_owns(ours)" in done.stderr, done.stderr


def test_the_driver_can_be_named(workshop: Workshop, sim_dir: Path, sim_so: Path) -> None:
    program = workshop.program("process_wide.c")
    settings = {"SIRE_REGION": "r", "SIRE_SIM_MEMORY": "512MiB"}
    check(workshop.run(program, "r", folders=(sim_dir,), SIRE_LIBCUDA=str(sim_so), extra=settings))
    missing = workshop.run(program, "r", folders=(sim_dir,), SIRE_LIBCUDA="/nonexistent/libcuda.so.1", extra=settings)
    assert missing.returncode == 1 and "/nonexistent/libcuda.so.1" in missing.stderr


def test_the_driver_is_found_through_the_callers_runtime(workshop: Workshop, sim_so: Path, tmp_path: Path) -> None:
    # No libcuda.so.1 anywhere: only the runtime knows the driver.
    (tmp_path / "libcudart.so.13").symlink_to(sim_so)
    check(workshop.run(workshop.program("process_wide.c"), "r", folders=(tmp_path,), SIRE_REGION="r", SIRE_SIM_MEMORY="512MiB"))
    assert os.listdir(tmp_path) == ["libcudart.so.13"]


@pytest.mark.parametrize("slabs", ["0", "1"])
@pytest.mark.parametrize("how", ["again", "last", "paused", "lost", "captured", "other", "mapped", "early", "late"])
def test_a_device_that_is_reset(workshop: Workshop, sim_dir: Path, how: str, slabs: str) -> None:
    settings = {"SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_DEVICES": "2", "SIRE_SLABS": slabs}
    done = check(workshop.run(workshop.program("reset.c"), how, folders=(sim_dir,), extra=settings))
    assert "warning" not in done.stderr, done.stderr
