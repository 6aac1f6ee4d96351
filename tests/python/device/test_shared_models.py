"""Managed models that share tensors, as two that have one embedding: a use of one keeps what it has of the other's."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import managed
import pytest
import sire
import torch
from measure import MIB
from sire._adopt import adopt, adopted_by
from torch import nn


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As `managed.fresh`."""
    yield from managed.fresh()


class Tied(nn.Module):
    """A model around something that another one has, too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = shared, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(self.shared(x))


def two() -> tuple[Tied, Tied]:
    """The first one has what they share."""
    shared = nn.Linear(8, 8)
    first, second = Tied(shared), Tied(shared)
    sire.manage(first)
    sire.manage(second)
    return first, second


def where(model: nn.Module) -> set[str]:
    return {each.device.type for each in model.parameters()}


def uses(model: nn.Module) -> int:
    return int(sire.manage(model).user.locks)


@pytest.mark.parametrize("release", ["eager", "lazy"])
def test_the_end_of_one_use_takes_nothing_from_another(release: Any) -> None:
    """A use of the second was none of the first: the end of a use of the first took the embedding away under it, and
    what the second had brought of the first stayed on the device after its own.
    """
    sire.setup_default_pools(release=release)
    first, second = two()
    x = torch.ones(2, 8, device="cuda")
    with torch.no_grad(), sire.auto_manage(second):
        expected = second(x).cpu()
        with sire.auto_manage(first):
            assert uses(first) == 2
        sire.evict()
        assert where(second) == {"cuda"}
        assert torch.equal(second(x).cpu(), expected)
    assert where(first) == where(second) == {"cpu"}
    assert uses(first) == uses(second) == 0
    sire.evict()
    assert all(each["device_bytes"] == 0 for each in sire.summary()["objects"])


def test_modules_inside_of_managed_ones_stay_for_them() -> None:
    """The module inside was offloaded at the end of its own forward, in the middle of the other's."""

    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.own = inner, nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) @ self.inner.weight * self.own

    inner = nn.Linear(8, 8)
    model = Around(inner).eval()
    for each in (inner, model):
        sire.AutoManageHook.manage_module(each)
    with torch.no_grad():
        assert model(torch.ones(2, 8)).is_cuda
    assert where(model) == {"cpu"}


def test_all_or_none_of_those_that_share_come() -> None:
    shared, sizes = nn.Linear(1024, 512, bias=False), (512, 1024)
    first, second = (nn.Sequential(shared, nn.Linear(*sizes, bias=False)) for _ in range(2))
    sire.manage(first)
    sire.setup_default_pools(vram_limit=5 * MIB)
    with pytest.raises(sire.OutOfMemoryError), sire.auto_manage(second):
        pass
    assert uses(first) == uses(second) == 0
    assert where(first) == where(second) == {"cpu"}
    sire.setup_default_pools(vram_limit=7 * MIB)
    with sire.auto_manage(second):
        assert where(first) == where(second) == {"cuda"}
    assert where(first) == where(second) == {"cpu"}


def test_one_that_is_pinned_keeps_what_it_shares() -> None:
    first, second = two()
    sire.pin(second)
    with sire.auto_manage(first):
        pass
    sire.evict()
    assert where(second) == {"cuda"}
    sire.unpin(second)
    assert where(first) == where(second) == {"cpu"}


def test_what_is_hung_in_later_is_shared_from_the_next_use_on() -> None:
    first, second = (sire.manage(nn.Sequential(nn.Linear(8, 8))).get_manage_object() for _ in range(2))
    first.append(second[0])
    with sire.auto_manage(first):
        assert uses(second) == 1
        assert where(first) == {"cuda"}
    assert where(first) == {"cpu"}
    assert uses(second) == 0


def test_each_may_have_something_of_the_others() -> None:
    """Each brought the other, and that the first again, until Python's stack was full."""
    first, second = two()
    first.more = second.own
    for model in (first, second):
        with sire.auto_manage(model):
            assert where(first) == where(second) == {"cuda"}
        assert where(first) == where(second) == {"cpu"}
        assert uses(first) == uses(second) == 0


def test_what_is_shared_outlives_the_model_that_had_it_first() -> None:
    """Nobody offloaded it any more."""
    first, second = two()
    with torch.no_grad():
        expected = second(torch.ones(2, 8))
    adopted = adopted_by(first)
    del first
    gc.collect()
    for _ in range(2):
        with torch.no_grad(), sire.auto_manage(second):
            assert torch.allclose(second(torch.ones(2, 8, device="cuda")).cpu(), expected, atol=1e-5)
        assert where(second) == {"cpu"}
        assert adopted is not None
        assert adopted.resident_bytes == 0


def test_one_that_nobody_manages_is_left_to_whoever_adopted_it() -> None:
    first, second = (Tied(shared) for shared in [nn.Linear(8, 8)] * 2)
    adopted = adopt(first)
    sire.manage(second)
    with sire.auto_manage(second):
        assert where(second) == {"cuda"}
    assert adopted.loaded
    adopted.offload()
    adopted.release()
