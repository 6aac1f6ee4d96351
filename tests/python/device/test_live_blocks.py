"""Only live bytes: what PyTorch's cache holds free in a region's pool is neither copied nor restored.

In hook mode ``allocator`` the cache is the library's. It knows by itself what is free, and does not count it.
"""

from __future__ import annotations

from typing import Any

import pytest
import sire
import torch
from measure import MIB, device_used, on_software_device
from sire import _blocks, _torch


def full(value: int, mebibytes: int) -> torch.Tensor:
    return torch.full((mebibytes * MIB,), value, dtype=torch.uint8, device="cuda")


def states(tag: str) -> list[str]:
    """How the blocks of a region's pool are, as PyTorch says, or the library where it is PyTorch's allocator."""
    shelves = [shelf for key, shelf in _torch.shelves() if key[0] == tag]
    segments = [each for each in sire.memory_snapshot() if each["tag"] == tag]
    for shelf in shelves:
        segments += _torch.segments(torch, shelf.all[0].mem_pool.id)
    return [block["state"] for each in segments for block in each["blocks"]]


@pytest.fixture
def own_cache(mode: str) -> bool:
    """Whether the cache is the library's."""
    return mode == "allocator"


@pytest.mark.parametrize("backup", ["cpu", "disk"])
def test_free_blocks_are_not_copied_and_live_ones_are_intact(tag: str, backup: Any, own_cache: bool) -> None:
    with sire.region(tag, backup=backup):
        tensors = [full(n, 4) for n in range(10)]
    expected = [each.cpu() for each in tensors[::2]]
    del tensors[1::2]
    report = sire.pause(tag)
    assert report.bytes_dead == (0 if own_cache else 20 * MIB)
    assert report.bytes_copied == 20 * MIB
    assert report.bytes_discarded == 0
    assert report.bytes_moved == report.bytes_expected == 40 * MIB
    assert report.notes == ()
    assert ("free in PyTorch's cache" in str(report)) != own_cache
    assert sire.resume(tag).bytes_copied == 20 * MIB
    assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors, expected, strict=True))
    with sire.region(tag, backup=backup):
        more = [full(100 + n, 4) for n in range(5)]
    assert sire.pause(tag).bytes_dead == 0
    sire.resume(tag)
    assert all(bool((each == 100 + n).all()) for n, each in enumerate(more))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors, expected, strict=True))


def test_it_can_be_switched_off(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensors = [full(n, 4) for n in range(5)]
    del tensors[1:4]
    assert sire.pause(tag, live_only=False).bytes_copied == 20 * MIB
    sire.resume(tag)
    assert bool((tensors[1] == 4).all())


def test_blocks_that_wait_for_a_stream_count_as_live_until_somebody_asks(tag: str, own_cache: bool) -> None:
    stream = torch.cuda.Stream()
    with sire.region(tag, backup="cpu"):
        pending, other, stays = full(1, 4), full(2, 4), full(3, 4)
    pending.record_stream(stream)
    del pending
    # PyTorch asks whether the stream has passed when it next allocates; the library, when a pause has waited for it.
    waiting = "active_awaiting_free" if own_cache else "active_pending_free"
    assert states(tag).count(waiting) == 1
    del other
    report = sire.pause(tag)
    assert report.bytes_copied == (4 if own_cache else 8) * MIB
    assert report.bytes_dead == (0 if own_cache else 12 * MIB)
    sire.resume(tag)
    assert bool((stays == 3).all())


def test_wholly_free_segments_go_back_to_the_driver(tag: str, own_cache: bool) -> None:
    before = device_used()
    with sire.region(tag, backup="cpu"):
        stays, goes = full(1, 32), full(2, 48)
    address = stays.data_ptr()
    del goes
    # `device_used` empties caches: PyTorch keeps what is free in a pool that lives (pytorch#145168).
    assert device_used() - before >= (32 if own_cache else 80) * MIB
    report = sire.pause(tag)
    assert report.bytes_expected == 32 * MIB
    assert report.bytes_dead == 0
    sire.resume(tag)
    if on_software_device():
        assert device_used() - before == 32 * MIB
    assert stays.data_ptr() == address
    assert bool((stays == 1).all())
    for turn in range(3):
        with sire.region(tag, backup="cpu"):
            again = full(turn, 48)
        sire.pause(tag)
        sire.resume(tag)
        assert bool((again == turn).all())
        assert bool((stays == 1).all())
        del again
    del stays
    sire.pause(tag)
    sire.resume(tag)


def test_a_retired_pools_free_blocks_are_dead_too(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        first = [full(n, 4) for n in range(5)]
        goes = full(9, 32)
    del goes
    sire.pause(tag)
    sire.resume(tag)
    with sire.region(tag, backup="cpu"):
        second = full(7, 4)
    del first[:4]
    assert sire.pause(tag).bytes_dead == 16 * MIB + 16 * MIB
    sire.resume(tag)
    assert bool((first[0] == 4).all())
    assert bool((second == 7).all())


def test_a_pool_that_is_in_use_is_not_dropped(tag: str) -> None:
    """Another region's pool is current while this one is paused: PyTorch 2.11 would end the process."""
    with sire.region(tag, backup="cpu"):
        stays, goes = full(1, 32), full(2, 48)
    del goes
    with sire.region("elsewhere", backup="cpu"):
        sire.pause(tag)
        other = full(3, 2)
    sire.resume(tag)
    assert bool((stays == 1).all())
    assert bool((other == 3).all())


def test_a_map_that_costs_more_than_it_saves_is_not_taken(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with sire.region(tag, backup="cpu"):
        tensors = [full(n, 4) for n in range(5)]
    del tensors[1:4]
    monkeypatch.setattr(_blocks, "_SECONDS_PER_BLOCK", 10.0)
    report = sire.pause(tag)
    assert report.bytes_copied == 20 * MIB
    assert "would take" in report.notes[0]
    sire.resume(tag)
    assert bool((tensors[1] == 4).all())


def test_a_map_that_cannot_be_read_costs_only_its_gain(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with sire.region(tag, backup="cpu"):
        tensors = [full(n, 4) for n in range(5)]
    del tensors[1:4]
    monkeypatch.setattr(_torch, "segments", lambda *_: [{}])
    report = sire.pause(tag)
    assert report.bytes_copied == 20 * MIB
    assert "could not be read" in report.notes[0]
    sire.resume(tag)
    assert bool((tensors[1] == 4).all())


def test_an_interruption_of_the_map_refuses_the_pause(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = full(5, 4)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_blocks.BlockMap, "_taken", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sire.pause(tag)
    monkeypatch.undo()
    assert not sire.region(tag, backup="cpu").paused
    sire.pause(tag)
    sire.resume(tag)
    assert bool((tensor == 5).all())


@pytest.mark.parametrize("something_lives", [False, True])
def test_memory_of_dead_tensors_goes_back(tag: str, something_lives: bool, expandable_segments: bool) -> None:
    """A user deleted the tensors of a region, emptied PyTorch's cache, and the device stayed full: PyTorch leaves what
    is free in a pool alone, and a block that another stream has done with counts as used until somebody looks.
    """
    with sire.region(tag, backup="cpu"):
        lives = full(1, 1) if something_lives else None
        dead = full(2, 64)
    other = torch.cuda.Stream()
    dead.record_stream(other)
    other.wait_stream(torch.cuda.current_stream())
    del dead
    free = torch.cuda.mem_get_info()[0]
    returned = sire.empty_cache()
    if expandable_segments and something_lives:
        assert returned < 64 * MIB, "PyTorch can drop such a pool now: do it"
    else:
        assert returned >= 64 * MIB
        assert torch.cuda.mem_get_info()[0] - free >= 64 * MIB

    with sire.region(tag, backup="cpu"):
        new = full(3, 8)
    sire.pause(tag)
    sire.resume(tag)
    assert bool((new == 3).all())
    assert lives is None or bool((lives == 1).all())


def test_an_empty_cache_is_none_of_a_region_that_is_open(tag: str) -> None:
    with sire.region(tag):
        dead = full(1, 32)
        del dead
        sire.empty_cache()
        new = full(2, 32)
    sire.pause(tag)
    sire.resume(tag)
    assert new.numel() == 32 * MIB


@pytest.mark.parametrize("wait", [0.0, 5.0])
def test_a_resume_takes_what_is_only_cached(tag: str, wait: float) -> None:
    """A user's resume failed for want of memory that nobody used: PyTorch held it for its next tensors."""
    free = torch.cuda.mem_get_info()[0]
    with sire.region(f"{tag}/away"):
        away = torch.empty(free // 2, dtype=torch.uint8, device="cuda")
    sire.pause(f"{tag}/away")
    cached = torch.empty(free // 3, dtype=torch.uint8, device="cuda")
    with sire.region(f"{tag}/other"):
        dead = torch.empty(free // 3, dtype=torch.uint8, device="cuda")
    del cached, dead
    assert torch.cuda.mem_get_info()[0] < away.numel()
    sire.resume(f"{tag}/away", wait=wait)
    away.fill_(3)
    assert int(away[-1]) == 3
