"""Fixtures for the package's tests.

Tests in this directory need neither PyTorch nor a device: they use a stand-in for the library. The ones in
``device/`` run real PyTorch, once per hook mode; ``test_device_modes.py`` starts them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "python-shim" / "src"
if str(SOURCE) not in sys.path and not os.environ.get("SIRE_TEST_INSTALLED"):
    sys.path.insert(0, str(SOURCE))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT / "tests" / "support"))

# A job that a script's shell starts in the background begins with SIGINT ignored, and Python leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not os.environ.get("SIRE_TEST_MODE"):
    collect_ignore = ["device"]

from fake_library import FakeLibrary  # noqa: E402


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    """The package with a stand-in for the loaded library, and nothing decided yet."""
    from sire import _hooks, _library

    fake = FakeLibrary()
    for name in ("LD_PRELOAD", "SIRE_HOOK_MODE", "TMS_HOOK_MODE", "SIRE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_library, "_loaded", fake)
    monkeypatch.setattr(_hooks, "_wanted", None)
    monkeypatch.setattr(_hooks, "_decided", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    yield fake
    assert fake.problems == []
