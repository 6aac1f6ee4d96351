"""Fixtures for tests with real PyTorch. SIRE_TEST_MODE says which hook mode this process is in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sire

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

MODE = os.environ.get("SIRE_TEST_MODE", "torch")


@pytest.fixture
def mode() -> str:
    """The hook mode of this process."""
    return MODE


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
