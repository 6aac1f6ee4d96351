"""Clean backups: what has not changed since the last pause is not copied, what has is never missed."""

from __future__ import annotations

import pytest
import sire
import torch
from measure import MIB, stranger


def full(value: int, mebibytes: int = 16) -> torch.Tensor:
    return torch.full((mebibytes * MIB,), value, dtype=torch.uint8, device="cuda")


def test_immutable_memory_is_copied_once(tag: str) -> None:
    with sire.region(tag, backup="cpu", immutable=True):
        weight = torch.randn(4 * MIB, device="cuda")
    expected = weight.cpu()
    assert sire.pause(tag).bytes_copied == 16 * MIB
    sire.resume(tag)
    for _ in range(3):
        report = sire.pause(tag)
        assert report.bytes_copied == 0
        assert report.bytes_clean == 16 * MIB
        assert "unchanged" in str(report)
        sire.resume(tag)
        assert torch.equal(weight.cpu(), expected)


def test_what_is_told_to_have_changed_is_copied_again(tag: str) -> None:
    with sire.region(tag, backup="cpu", immutable=True):
        weight = full(1)
    sire.pause(tag)
    sire.resume(tag)
    new = torch.randint(256, (4 * MIB,), dtype=torch.uint8)
    weight[: 4 * MIB] = new.cuda()
    sire.changed(weight[: 4 * MIB])
    report = sire.pause(tag)
    assert 4 * MIB <= report.bytes_copied < 16 * MIB
    sire.resume(tag)
    assert torch.equal(weight[: 4 * MIB].cpu(), new)
    assert bool((weight[4 * MIB :] == 1).all())


def test_a_new_tensor_in_an_old_block_is_copied(tag: str) -> None:
    """PyTorch gives the block of a dead tensor to the next one without a call; its old backup must not come back."""
    region = sire.region(tag, backup="cpu", immutable=True)
    with region:
        stays, goes = full(1), full(2)
    sire.pause(tag)
    sire.resume(tag)
    address = goes.data_ptr()
    del goes
    with region:
        new = full(3)
    assert new.data_ptr() == address
    sire.pause(tag)
    sire.resume(tag)
    assert bool((new == 3).all())
    assert bool((stays == 1).all())
    with region:
        pass
    assert sire.pause(tag).bytes_copied == 0
    sire.resume(tag)


def test_changed_wants_memory_of_a_region(tag: str) -> None:
    with pytest.raises(sire.UnknownAddressError):
        sire.changed(stranger(lambda: torch.ones(4, device="cuda")))
    with pytest.raises(sire.InvalidArgumentError):
        sire.changed(torch.ones(4))
