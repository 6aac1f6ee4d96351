"""`sire replay`: a program's calls are recorded by the preloaded library and made again, with every byte compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Sire, clean_environment

CC = os.environ.get("CC", "cc")


@pytest.fixture
def trace(library: Path, stand_in: Path, tmp_path: Path) -> Path:
    """What a C program of two regions asked for."""
    if shutil.which(CC) is None:
        pytest.skip("no C compiler; set CC")
    for name in ("libcudart.so.13", "libcuda.so.1"):
        (tmp_path / name).symlink_to(stand_in)
    source, program = tmp_path / "life.c", tmp_path / "life"
    source.write_text(LIFE)
    command = [CC, f"-I{ROOT / 'include'}", str(source), str(library), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    written = tmp_path / "life.trace"
    environment = clean_environment(SIRE_TRACE=written, LD_LIBRARY_PATH=f"{tmp_path}:{library.parent}", SIRE_SIM_MEMORY="64MiB")
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -6, f"exit {done.returncode}: {done.stderr}"
    assert written.stat().st_mode & 0o777 == 0o600
    return written


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


def test_what_is_no_trace_is_refused(sire: Sire, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    done = sire("replay", file)
    assert done.returncode == 1
    assert "not a trace" in done.stderr
    assert sire("replay", tmp_path / "missing").returncode == 1
