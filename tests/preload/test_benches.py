"""The benchmark programs run, report in the agreed form, and their exact figures are what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_hook_costs(sire_so: Path, sim_so: Path) -> None:
    environment = os.environ | {"SIRE_ALLOC_SO": str(sire_so), "SIRE_SIM_SO": str(sim_so)}
    command = [sys.executable, str(ROOT / "benches" / "run.py"), "--quick", "hooks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}
    for result in results.values():
        assert set(result) == {"name", "value", "unit", "samples", "simulated", "device"}
        assert result["simulated"] is False  # measured, on the device that the result names
        assert result["value"] >= 0
        assert result["samples"] > 0
    # Times depend on the machine; calls do not. A small allocation comes from a slab, a foreign pointer concerns no driver.
    for live in (1000, 1000000):
        assert results[f"hooks/pass-through beside own/driver calls per pair/live={live}"]["value"] == 0
        assert results[f"hooks/own, 512 bytes/driver calls per pair/live={live}"]["value"] < 0.1
        assert 0 < results[f"hooks/own, 2 MiB/driver calls per pair/live={live}"]["value"] <= 12
    # Flat: a thousand times as many live allocations do not make an operation dearer, the machine's noise allowed for.
    for name in ("pass-through beside own/allocate", "pass-through beside own/free", "own, 512 bytes/allocate", "own, 512 bytes/free"):
        few, many = (results[f"hooks/{name}/live={live}"]["value"] for live in (1000, 1000000))
        assert many < 4 * few + 1000, f"{name}: {few} ns, then {many} ns"


def test_stall(sire_so: Path, sim_so: Path) -> None:
    environment = os.environ | {"SIRE_ALLOC_SO": str(sire_so), "SIRE_SIM_SO": str(sim_so)}
    command = [sys.executable, str(ROOT / "benches" / "run.py"), "--quick", "stall"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}
    for beside in ("nothing", "copy", "pause"):
        for whose in ("own", "forwarded", "seldom"):
            for call in ("allocate", "free"):
                marks = [results[f"stall/beside {beside}/{whose}/{call}/{mark}"] for mark in ("median", "p99", "worst")]
                assert all(mark["unit"] == "us" and mark["samples"] > 0 for mark in marks)
                values = [mark["value"] for mark in marks]
                assert values == sorted(values)
                # A pair takes two calls, and none counts that was to come when all was over.
                seconds = results[f"stall/beside {beside}/{whose}/seconds"]["value"]
                assert marks[0]["samples"] <= seconds / (0.05 if whose == "seldom" else 0.002) + 1
    # The machine's noise included: a call beside a pause never waits for the whole of it plus a second.
    for whose in ("own", "forwarded", "seldom"):
        longest = (results[f"stall/beside pause/{whose}/seconds"]["value"] + 1) * 1e6
        assert results[f"stall/beside pause/{whose}/allocate/median"]["value"] < longest
