"""Tests of the aten operations on the software CUDA device; they run only in an environment of that device."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


def _reason() -> str | None:
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    try:
        import sire_software_device
    except ImportError:
        return "the package sire_software_device is not installed: run these tests in an environment of the software device"
    if not sire_software_device.installed():
        return "the CUDA runtime that PyTorch loaded is not the software device"
    return None if torch.cuda.is_available() else "the software device has no device (SIRE_SIM_DEVICES=0?)"


_REASON = _reason()
collect_ignore_glob: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip everything, with the reason, where there is no software device."""
    here = str(__file__).rsplit("/", 1)[0]
    for item in items:
        if _REASON is not None and str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason=_REASON))


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def two_devices() -> None:
    """Skip unless the process has two devices (SIRE_SIM_DEVICES=2)."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs SIRE_SIM_DEVICES=2")
