"""Switch: one tag is paused and another resumed in one call, on a device that cannot hold both."""

from __future__ import annotations

import pytest
import sire
import torch
from measure import MIB, device_used, on_software_device


def full(value: int, mebibytes: int) -> torch.Tensor:
    return torch.full((mebibytes * MIB,), value, dtype=torch.uint8, device="cuda")


def holds(tensor: torch.Tensor, value: int) -> bool:
    """Compared by the host: the device has no room for the comparison's result."""
    return bool((tensor.cpu() == value).all())


def test_two_models_take_turns(tag: str) -> None:
    with sire.region(f"{tag}/a", backup="cpu"):
        one = full(1, 96)
    sire.pause(f"{tag}/a")
    with sire.region(f"{tag}/b", backup="cpu", immutable=True):
        two = full(2, 96)
    free, _ = torch.cuda.mem_get_info()
    ballast = full(9, (free >> 20) - 64) if on_software_device() else None
    used = device_used()
    with pytest.raises(torch.OutOfMemoryError):
        sire.resume(f"{tag}/a")
    for _ in range(2):
        left, came = sire.switch(pause=f"{tag}/b", resume=f"{tag}/a")
        assert (left.action, came.action) == ("pause", "resume")
        assert device_used() == used
        assert came.bytes_copied == 96 * MIB
        assert holds(one, 1)
        left, came = sire.switch(pause=f"{tag}/a", resume=f"{tag}/b")
        assert left.bytes_copied == 96 * MIB
        assert holds(two, 2)
    del ballast
    torch.cuda.empty_cache()


def test_free_blocks_are_left_out(tag: str, mode: str) -> None:
    with sire.region(f"{tag}/a", backup="cpu"):
        tensors = [full(n, 4) for n in range(5)]
    with sire.region(f"{tag}/b", backup="cpu"):
        other = full(7, 32)
    sire.pause(f"{tag}/b")
    del tensors[1:4]
    left, _ = sire.switch(pause=f"{tag}/a", resume=f"{tag}/b")
    assert left.bytes_copied == 8 * MIB
    # What the library's own cache holds free goes uncounted.
    assert left.bytes_dead == (0 if mode == "allocator" else 12 * MIB)
    assert holds(other, 7)
    sire.switch(pause=f"{tag}/b", resume=f"{tag}/a")
    assert holds(tensors[1], 4)


def test_one_region_cannot_go_both_ways(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = full(1, 4)
    for wrong in ({"pause": tag, "resume": tag}, {"pause": tag, "resume": ""}, {"pause": 5, "resume": tag}):
        with pytest.raises(sire.InvalidArgumentError):
            sire.switch(**wrong)
    with pytest.raises(sire.UnknownTagError):
        sire.switch(pause=tag, resume="nobody")
    assert holds(tensor, 1)
