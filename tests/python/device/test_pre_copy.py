"""Backups that are made while the program goes on: the pause copies only what has changed since."""

from __future__ import annotations

import threading

import pytest
import sire
import torch
from measure import MIB, region_bytes


def test_what_was_pre_copied_is_not_copied_by_the_pause(tag: str) -> None:
    with sire.region(tag, backup="cpu", immutable=True):
        weight = torch.randn(8 * MIB, device="cuda")
    expected = weight.cpu()
    resident = region_bytes(tag)["resident_bytes"]
    report = sire.pre_copy(tag)
    assert report.bytes_copied == resident >= 32 * MIB
    size = f"{resident / MIB:.2f} MiB"
    assert f"{size} of {size} copied" in str(report)
    assert torch.equal(weight.cpu(), expected)
    assert sire.pre_copy(tag).bytes_copied == 0
    report = sire.pause(tag)
    assert (report.bytes_copied, report.bytes_clean) == (0, 32 * MIB)
    sire.resume(tag)
    assert torch.equal(weight.cpu(), expected)


@pytest.mark.parametrize("verify", ["hash", "bytes"])
def test_training_goes_on_beside_it(tag: str, verify: sire._regions.Verify) -> None:
    with sire.region(tag, backup="cpu", verify=verify):
        frozen = torch.randn(8 * MIB, device="cuda")
        trained = torch.zeros(4 * MIB, device="cuda")
    expected = frozen.cpu()
    thread = threading.Thread(target=lambda: sire.pre_copy(tag))
    thread.start()
    steps = 0
    while thread.is_alive() or steps < 5:
        trained += 1
        steps += 1
    thread.join()
    report = sire.pause(tag)
    assert report.bytes_copied <= 16 * MIB
    assert report.bytes_clean >= 32 * MIB
    sire.resume(tag)
    assert torch.equal(frozen.cpu(), expected)
    assert bool((trained == steps).all())


def test_a_new_tensor_after_it_is_copied(tag: str) -> None:
    region = sire.region(tag, backup="cpu", immutable=True)
    with region:
        stays = torch.ones(4 * MIB, device="cuda")
        goes = torch.ones(4 * MIB, device="cuda")
    sire.pre_copy(tag)
    address = goes.data_ptr()
    del goes
    with region:
        new = torch.full((4 * MIB,), 3.0, device="cuda")
    assert new.data_ptr() == address
    sire.pause(tag)
    sire.resume(tag)
    assert bool((new == 3).all())
    assert bool((stays == 1).all())


def test_memory_of_which_nothing_is_promised_is_refused(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        kept = torch.ones(MIB, device="cuda")
    with pytest.raises(sire.InvalidArgumentError, match="immutable"):
        sire.pre_copy(tag)
    assert bool((kept == 1).all())
