"""Memory of a paused tag stays until somebody needs it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import sire
import torch
from measure import MIB, region_bytes


def lazy_bytes(tag: str) -> int:
    return sum(int(each["lazy_bytes"]) for each in sire.stats()["regions"] if each["tag"] == tag)


def test_a_resume_before_anybody_needs_it_moves_nothing(tag: str) -> None:
    region = sire.region(tag, backup="cpu")
    with region:
        weight = torch.randn(8 * MIB, device="cuda")
    expected = weight.cpu()
    resident = region_bytes(tag)["resident_bytes"]
    report = sire.pause(tag, release="lazy")
    assert (report.bytes_copied, report.bytes_moved, report.bytes_lazy) == (32 * MIB, 0, resident)
    assert "kept until needed" in str(report)
    assert region.paused
    assert lazy_bytes(tag) == resident >= 32 * MIB
    with pytest.raises(sire.PausedError), region:
        pass
    report = sire.resume(tag)
    assert (report.regions_changed, report.bytes_copied, report.bytes_moved) == (1, 0, 0)
    assert torch.equal(weight.cpu(), expected)


def test_it_goes_when_it_is_said(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        weight = torch.randn(8 * MIB, device="cuda")
    expected = weight.cpu()
    resident = region_bytes(tag)["resident_bytes"]
    for give in (lambda: sire.pause(tag), sire.trim):
        sire.pause(tag, release="lazy")
        give()
        assert lazy_bytes(tag) == 0
        assert sire.resume(tag).bytes_moved == resident
        assert torch.equal(weight.cpu(), expected)


def test_a_tensor_elsewhere_gets_the_memory(tag: str, preloaded: bool) -> None:
    """In hook mode torch PyTorch allocates outside of regions without Sire, which cannot make way then."""
    free, _ = torch.cuda.mem_get_info()
    size = (free * 3 // 5) // MIB * MIB
    with sire.region(f"{tag}/cache"):
        cache = torch.empty(size, dtype=torch.uint8, device="cuda")
    sire.pause(tag, release="lazy")
    assert lazy_bytes(f"{tag}/cache") >= size
    with nullcontext() if preloaded else sire.region(f"{tag}/other", backup="cpu"):
        other = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert lazy_bytes(f"{tag}/cache") == 0
    other[:MIB] = 3
    assert bool((other[:MIB] == 3).all())
    del other
    torch.cuda.empty_cache()
    if not preloaded:
        sire.pause(f"{tag}/other")
    sire.resume(f"{tag}/cache")
    cache[:MIB] = 4
    assert bool((cache[:MIB] == 4).all())
