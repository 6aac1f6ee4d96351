"""The demo succeeds, and would notice: each sabotage makes it fail for the reason that it breaks.

Run from a checkout whose demo environment exists (`scripts/demo` or `scripts/test` makes it); offline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "scripts" / "demo"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DEMO), "--device", "software", *arguments], capture_output=True, text=True, timeout=600, check=False)


def test_the_quick_demo_needs_no_pytorch() -> None:
    done = demo("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every byte is back at the same address" in done.stdout


def test_the_demo_shows_everything_and_writes_its_figures(tmp_path: Path) -> None:
    figures_file = tmp_path / "figures.json"
    done = demo("--offline", "--json", str(figures_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OutOfMemoryError" in done.stdout, "without Sire the models do not fit"
    figures = {figure["name"]: figure for figure in json.loads(figures_file.read_text())}
    for mode in ("preload", "torch"):
        for model in ("all-minilm-l6-v2", "gpt2", "llama-117m"):
            assert figures[f"demo.turns-{mode}.{model}.exact"]["value"] == 1
            paused = figures[f"demo.turns-{mode}.{model}.paused"]["value"]
            resident = figures[f"demo.turns-{mode}.{model}.resident"]["value"]
            assert paused < resident / 2
            for verb in ("pause", "resume"):
                figure = figures[f"demo.turns-{mode}.{model}.seconds_{verb}"]
                assert figure["ratio"] == pytest.approx(figure["ceiling"] / figure["value"])
                assert 0 < figure["ceiling"] < 60
    assert figures["demo.baseline.out_of_memory"]["value"] == 1
    assert figures["demo.baseline.models_loaded"]["value"] < figures["demo.baseline.models"]["value"] == 3
    assert figures["demo.contention-preload.exact"]["value"] == 1
    assert figures["demo.contention-preload.waited_seconds"]["value"] > 0
    assert figures["demo.serving.exact"]["value"] == 1
    assert 3 <= figures["demo.serving.loads"]["value"] < figures["demo.serving.requests"]["value"]
    assert figures["demo.serving.bytes_copied"]["value"] <= figures["demo.serving.bytes_with_to"]["value"] / 2
    assert figures["demo.serving.peak"]["value"] <= figures["demo.serving.room"]["value"]
    assert figures["demo.control.paused"]["value"] < figures["demo.control.resident"]["value"]
    assert figures["demo.control-contention.survived"]["value"] in (0, 1)
    assert all(figure["simulated"] is False for figure in figures.values())
    assert (ROOT / ".sire" / "demo" / "memory.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("sabotage", "promise"),
    [
        ("unmap-only", "its physical memory is back"),
        ("skip-copy", "bit-identical"),
        ("move-address", "every tensor has the address it had before"),
    ],
)
def test_a_sabotaged_demo_fails(sabotage: str, promise: str) -> None:
    done = demo("--offline", "--sabotage", sabotage)
    assert done.returncode == 1, done.stdout + done.stderr
    refused = [line for line in done.stdout.splitlines() if "NOT SHOWN: " in line and promise in line]
    assert len(refused) == 2, f"not in both hook modes: {done.stdout}{done.stderr}"


def test_a_large_device_is_made_small_where_it_is_about_too_little(tmp_path: Path) -> None:
    """As on a GPU, where the three models would fit side by side."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIRE_")}
    environment |= {"SIRE_SIM_MEMORY": "4GiB", "SIRE_SIM_DEVICES": "1", "SIRE_SIM_DIR": str(tmp_path / "device"), "HF_HUB_OFFLINE": "1"}
    scenario = ROOT / "scripts" / "demo_support" / "scenario.py"
    done = subprocess.run([sys.executable, str(scenario), str(tmp_path), "baseline"], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OutOfMemoryError" in done.stdout
    assert json.loads((tmp_path / "baseline.json").read_text())["models_loaded"] < 3


def test_an_unknown_sabotage_is_refused() -> None:
    done = demo("--sabotage", "everything")
    assert done.returncode == 2
    assert "unknown sabotage" in done.stderr
