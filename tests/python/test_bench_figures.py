"""``scripts/bench``: the figures that compare the whole-process allocator with PyTorch's own can be had.

Tiny sizes: of what is measured only the bytes mean anything here, because they are the same in every run.
Not in tests/bench, whose environment has no PyTorch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sire

from test_device_modes import why_not

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "import sys; from bench_support.main import main; sys.exit(main())"


def figures(folder: Path, *only: str) -> dict[str, dict[str, Any]]:
    """Those whose names begin so, by name."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("SIRE_TEST_REQUIRE_DEVICE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    stand_in = Path(os.environ.get("SIRE_SIM_SO") or target / "release" / "libsire_sim_cuda.so")
    if not stand_in.is_file():
        pytest.skip(f"{stand_in} is not there: scripts/build, or name it in SIRE_SIM_SO")
    written = folder / "figures.json"
    variables = os.environ | {"PYTHONPATH": str(ROOT / "scripts"), "SIRE_SIM_SO": str(stand_in)}
    variables |= {"SIRE_ALLOC_SO": str(sire.library_path())}
    words = ["--smoke", "--offline", "--device", "software", "--json", written, "--picture", folder / "bench.png"]
    wanted = [word for name in only for word in ("--only", name)]
    command = [sys.executable, "-c", COMMAND, *words, *wanted]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not measured" not in done.stdout
    return {figure["name"]: figure for figure in json.loads(written.read_text())}


def test_a_workloads_memory_is_compared_with_pytorchs_own(tmp_path: Path) -> None:
    found = figures(tmp_path, "trace.training")
    names = ("reserved_vs_native", "fragmentation", "time_vs_native")
    assert set(found) == {f"trace.training.{name}" for name in names}
    reserved = found["trace.training.reserved_vs_native"]
    assert reserved["ratio_min"] == reserved["ratio_max"], "bytes do not depend on what else the machine does"
    assert 0.5 < reserved["ratio"] <= 1
    assert reserved["met"] is True
    assert "a transformer's training" in reserved["notes"][0]
    held = found["trace.training.fragmentation"]
    assert 1 <= held["value"] <= held["ceiling"] < 2


def test_the_allocators_times_are_compared_with_pytorchs_own(tmp_path: Path) -> None:
    found = figures(tmp_path, "alloc", "threads8")
    sizes = (4096, 65536, 1 << 20, 16 << 20)
    calls = {f"alloc.{size}.{what}_vs_native" for size in sizes for what in ("pair", "empty")}
    assert set(found) == calls | {"threads8.vs_native"}
    for figure in found.values():
        assert figure["samples"] == 2
        assert figure["ratio"] > 0
        assert figure["target"].startswith("ratio")


def test_very_many_blocks_are_compared_with_pytorchs_own(tmp_path: Path) -> None:
    found = figures(tmp_path, "blocks")
    assert set(found) == {"blocks.make_vs_native", "blocks.churn_vs_native"}
    assert all(figure["min"] > 0 and figure["ratio"] > 0 for figure in found.values())
