"""What tests of managed models share: pools that are fresh, and a small model."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from sire import models
from sire.models import _manage, _pools
from torch import nn


def fresh() -> Iterator[None]:
    """Default pools for each test; what it managed is released, and nobody uses anything any more."""
    _pools._management = None
    models.setup_default_pools(release="eager")
    yield
    for user in models.get_resource_management().users:
        close = getattr(user, "close", None)
        if close is not None:
            close()
    assert not _manage._holders, "a use was never ended"
    _manage._users_of.clear()
    models.setup_default_pools(release="eager")
    gc.collect()


def layers() -> nn.Module:
    """A small model in training mode, always the same."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).train()


def plainly(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A loss."""
    return model(x).square().mean()
