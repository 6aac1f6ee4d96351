"""The pictures that scripts/gpu-suite draws of its result: each from the figures it needs, and none without them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpu_suite_support import pictures

PNG = b"\x89PNG"
LINE = [[0.0, 100, 0], [1.5, 60, 10], [3.0, 40, 60]]
PLAIN = {"ratio": 0.9, "ceiling": 50.0, "bytes": 1 << 30}
FIGURES: list[dict[str, Any]] = [
    PLAIN | {"name": "kit.pause.retained.1MiB.x1.warm", "parts": {"prepare": 0.001, "transfer": 0.02}},
    PLAIN | {"name": "kit.resume.serial.1MiB.x1.warm", "parts": {"pinning": 0.4, "copies": 0.02}},
    {"name": "limit.to_host.64KiB", "value": 9.0},
    {"name": "limit.to_device.64KiB", "value": 8.0},
    {"name": "vmm.kit.create.2MiB", "value": 190.0},
    {"name": "vmm.kit.unmap.64MiB", "value": 25.0},
    {"name": "kit.switch.ahead.dirty.timeline", "milliseconds_free_ready": LINE},
    {"name": "kit.switch.switch.clean.timeline", "milliseconds_free_ready": LINE},
]
NEEDS = {"shares": "kit.", "parts": "kit.", "pieces": "limit.", "vmm": "vmm.", "switch": "kit.switch."}


def drawn(figures: list[dict[str, Any]], folder: Path) -> set[str]:
    """Names of the pictures that were written, which are not empty."""
    result = {"device": "software", "environment": {}, "figures": figures}
    paths = [Path(path) for path in pictures.draw(result, folder / "result.json")]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 2000 for path in paths)
    assert sorted(paths) == sorted(folder.glob("*.png"))
    return {path.suffixes[0].removeprefix(".") for path in paths}


def test_a_whole_result_becomes_every_picture(tmp_path: Path) -> None:
    assert drawn(FIGURES, tmp_path) == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_a_picture_without_figures_is_left_out(name: str, tmp_path: Path) -> None:
    left = [figure for figure in FIGURES if not figure["name"].startswith(NEEDS[name])]
    assert name not in drawn(left, tmp_path)


def test_no_figures_are_no_pictures(tmp_path: Path) -> None:
    assert drawn([], tmp_path) == set()
