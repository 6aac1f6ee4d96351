"""What tests of reservations and probes share: ledgers of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

MIB = 1024**2


def fresh(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Ledgers in this folder; every warning is an error."""
    patch.setenv("TORCHTOOLS_LOCK_DIR", str(folder))
    torch.cuda.init()
    torch.cuda.empty_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def tensor(size: int) -> torch.Tensor:
    """So many bytes."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")
