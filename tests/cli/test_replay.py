"""`sire replay`: a program's calls are recorded by the preloaded library and made again, with every byte compared."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Sire, clean_environment

CC = os.environ.get("CC", "cc")


Record = Callable[..., Path]


@pytest.fixture
def record(library: Path, stand_in: Path, tmp_path: Path) -> Record:
    """Compiles a C program and runs it; the trace of its calls."""
    if shutil.which(CC) is None:
        pytest.skip("no C compiler; set CC")
    for name in ("libcudart.so.13", "libcuda.so.1"):
        (tmp_path / name).symlink_to(stand_in)

    def run(text: str, *arguments: Path, status: int = 0) -> Path:
        source, program, written = (tmp_path / name for name in ("life.c", "life", "life.trace"))
        source.write_text(text)
        command = [CC, f"-I{ROOT / 'include'}", str(source), str(library), "-ldl", "-o", str(program)]
        subprocess.run(command, check=True, timeout=300)
        environment = clean_environment(SIRE_TRACE=written, LD_LIBRARY_PATH=f"{tmp_path}:{library.parent}", SIRE_SIM_MEMORY="64MiB")
        done = subprocess.run([str(program), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, f"exit {done.returncode}: {done.stderr}"
        assert written.stat().st_mode & 0o777 == 0o600
        return written

    return run


@pytest.fixture
def trace(record: Record) -> Path:
    """What a C program of two regions asked for."""
    return record(LIFE, status=-6)


LIFE = """
#include <sire.h>
#include <stdlib.h>
int main(void) {
    sire_region_options options = {.struct_size = sizeof options, .backup = 1};
    const char *tags[] = {"model/weights", "other"};
    for (int i = 0; i < 2; i++) {
        uint32_t region;
        void *ptr, *small;
        if (sire_region_open(tags[i], &options, &region) || sire_region_enter(region, 0)) return 1;
        if (sire_allocate(9 << 20, 0, NULL, &ptr) || sire_allocate(700, 0, NULL, &small)) return 2;
        if (sire_region_leave(region) || sire_pause(tags[i], NULL, NULL)) return 3;
    }
    if (sire_resume("model", NULL, NULL) || sire_pause("nobody", NULL, NULL) != SIRE_STATUS_UNKNOWN_TAG) return 4;
    /* Dies as badly as a program can: the trace has everything up to here. */
    abort();
}
"""


def test_a_recorded_program_is_replayed_and_compared(sire: Sire, trace: Path, tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    done = sire("replay", trace, "--device", "software", "--check", "--json", written)
    assert done.returncode == 0, done.stderr
    assert "0 allocations wrong" in done.stderr
    figures = {figure["name"]: figure for figure in json.loads(written.read_text())}
    assert figures["replay.allocate"]["samples"] == 4
    assert figures["replay.pause"]["samples"] == 2
    assert figures["replay.resume"]["bytes_copied"] >= 9 << 20
    assert figures["replay.pause"]["recorded"] > 0
    assert not any(figure["simulated"] for figure in figures.values())


def test_the_model_clock_is_called_simulated(sire: Sire, trace: Path) -> None:
    done = sire("replay", trace, "--profile", "h100-pcie5-kvcached")
    assert done.returncode == 0, done.stderr
    assert all(figure["simulated"] for figure in json.loads(done.stdout))
    refused = sire("replay", trace, "--profile", "h100-pcie5-kvcached", "--check")
    assert refused.returncode == 2
    assert "moves none" in refused.stderr


def test_info_needs_no_device(sire: Sire, trace: Path) -> None:
    done = sire("replay", trace, "--info")
    assert done.returncode == 0
    assert "1 devices, at most 4 allocations" in done.stdout


WEIGHTS = """
#define _GNU_SOURCE
#include <sire.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
enum { AT = 1237, BYTES = (5 << 20) + 40 };
static char from[BYTES], to[BYTES];
int main(int argc, char **argv) {
    /* Weights whose backup is the file that they were loaded from, beside memory that is handed to another process. */
    sire_region_options in_file = {.struct_size = sizeof in_file, .backup = 3}, thrown = {.struct_size = sizeof thrown};
    uint32_t weights, cache;
    void *ptr, *shared, *library = dlopen("libcudart.so.13", RTLD_NOW | RTLD_GLOBAL);
    int (*copy)(void *, const void *, size_t, int) = (int (*)(void *, const void *, size_t, int))dlsym(library, "cudaMemcpy");
    FILE *file = fopen(argv[1], "rb");
    if (argc != 2 || !copy || !file || fseek(file, AT, SEEK_SET) || fread(from, 1, BYTES, file) != BYTES) return 1;
    if (sire_region_open("weights", &in_file, &weights) || sire_region_open("cache", &thrown, &cache)) return 2;
    if (sire_region_enter(weights, 0) || sire_allocate(BYTES, 0, NULL, &ptr) || sire_region_leave(weights)) return 3;
    if (sire_region_enter(cache, 0) || sire_allocate(4 << 20, 0, NULL, &shared) || sire_region_leave(cache)) return 4;
    typedef int entry_point(const char *, void **, unsigned, unsigned long long, int *);
    entry_point *find = (entry_point *)dlsym(RTLD_DEFAULT, "cudaGetDriverEntryPointByVersion");
    int (*retain)(uint64_t *, void *);
    uint64_t handle;
    if (!find || find("cuMemRetainAllocationHandle", (void **)&retain, 12000, 0, NULL) || retain(&handle, shared)) return 5;
    if (copy(ptr, from, BYTES, 1) || sire_attach_file(ptr, BYTES, argv[1], AT)) return 6;
    if (sire_attach_file(ptr, BYTES, "no such file", 0) == SIRE_STATUS_OK) return 7;
    for (int cycle = 0; cycle < 2; cycle++) {
        sire_report report = {.struct_size = sizeof report};
        if (sire_pause("weights", NULL, &report) || report.bytes_copied != 0) return 8;
        if (sire_pause("cache", NULL, &report) || report.bytes_moved != 0) return 9;
        if (sire_resume("weights", NULL, NULL) || sire_resume("cache", NULL, NULL)) return 10;
    }
    return copy(to, ptr, BYTES, 2) || memcmp(from, to, BYTES) ? 11 : 0;
}
"""


def test_files_and_memory_that_was_handed_out_are_part_of_a_replay(sire: Sire, record: Record, tmp_path: Path) -> None:
    weights, figures = tmp_path / "weights.bin", tmp_path / "figures.json"
    weights.write_bytes(random.Random(7).randbytes(6 << 20))
    trace = record(WEIGHTS, weights)
    info = sire("replay", trace, "--info")
    assert f"backup file {weights} ({6 << 20} bytes), {(5 << 20) + 40} bytes of it attached" in info.stdout

    def replay() -> str:
        done = sire("replay", trace, "--device", "software", "--check", "--json", figures, TMPDIR=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "1 left out, 0 failed" in done.stderr
        assert "0 allocations wrong" in done.stderr
        found = {figure["name"]: figure for figure in json.loads(figures.read_text())}
        assert found["replay.attach_file"]["samples"] == found["replay.lend"]["samples"] == 1
        # The file holds every byte, and what was handed out stays.
        assert found["replay.pause"]["bytes_copied"] == 0
        assert found["replay.pause"]["bytes_moved"] == 2 * (6 << 20)
        return done.stderr

    assert f"{weights} ({6 << 20} bytes): the recorded file itself" in replay()
    weights.unlink()
    assert "made here, content generated" in replay()
    assert not list(tmp_path.glob("sire-replay-*"))


def test_what_is_no_trace_is_refused(sire: Sire, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    done = sire("replay", file)
    assert done.returncode == 1
    assert "not a trace" in done.stderr
    assert sire("replay", tmp_path / "missing").returncode == 1
