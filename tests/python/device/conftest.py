"""Fixtures for tests with real PyTorch. SIRE_TEST_MODE says which of the five configurations this process is in.

They are the hook modes, and `preload-expandable`: hook mode preload with PyTorch's expandable segments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sire

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

# Before 2.15, PyTorch keeps a workspace per thread and stream: a small one, as the devices of the tests are small.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")

import torch

MODE = os.environ.get("SIRE_TEST_MODE", "torch")

if MODE == "allocator":
    # Before anything uses CUDA.
    sire.use_allocator()


HERE = Path(__file__).resolve().parent


def skips(mode: str = MODE) -> dict[str, str]:
    """Tests that PyTorch makes impossible in a configuration, and why (``allocator_skips.txt`` and relatives)."""
    file = HERE / f"{mode.replace('-', '_')}_skips.txt"
    lines = [line for line in file.read_text().splitlines() if line and line[0] != "#"] if file.exists() else []
    return {test.strip(): why.strip() for test, _, why in (line.partition(":  ") for line in lines)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = skips()
    for item in items:
        why = known.get(f"{item.path.name}::{getattr(item, 'originalname', item.name)}")
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def mode() -> str:
    """The hook mode of this process."""
    return MODE.removesuffix("-expandable")


@pytest.fixture
def expandable_segments() -> bool:
    """Whether PyTorch's expandable segments are on from the start."""
    return MODE.endswith("-expandable")


@pytest.fixture
def preloaded() -> bool:
    """Whether PyTorch's own cudaMalloc is hooked in this process."""
    return MODE in ("preload", "preload-expandable", "driver")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Every test begins and ends with nothing paused, and leaves no tensors in PyTorch's default cache."""
    yield
    if torch.cuda.is_initialized():
        sire.resume()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@pytest.fixture
def tag(request: pytest.FixtureRequest) -> str:
    """A tag of this test's own."""
    return str(request.node.name).replace("[", "/").replace("]", "").replace("-", "/")
