"""Pause and resume of tensors: content, addresses, and memory that is really gone meanwhile."""

from __future__ import annotations

import pytest
import sire
import torch
from measure import MIB, device_blocks, device_used, on_software_device, stranger

SIZE = 64 * MIB


def full(value: int, size: int = SIZE) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8, device="cuda")


def test_the_mode_is_the_one_asked_for(mode: str, preloaded: bool) -> None:
    with sire.region("mode"):
        pass
    assert sire.hook_mode == mode
    assert sire.stats()["hook_live"] is preloaded
    assert sire.stats()["driver_hooks"]["live"] is (mode == "driver")


def test_memory_is_released_and_comes_back_at_the_same_address(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = torch.arange(SIZE // 4, dtype=torch.int32, device="cuda")
    address, content = tensor.data_ptr(), tensor.cpu()
    resident, blocks = device_used(), device_blocks()
    report = sire.pause(tag)
    assert resident - device_used() >= SIZE
    if blocks is not None:
        assert blocks - (device_blocks() or 0) >= SIZE
    assert report.bytes_moved == report.bytes_expected >= SIZE
    assert report.bytes_copied >= SIZE
    assert report.regions_changed == 1
    back = sire.resume(tag)
    assert back.bytes_moved == report.bytes_moved
    assert device_used() == resident
    assert tensor.data_ptr() == address
    assert torch.equal(tensor.cpu(), content)


def test_without_backup_content_is_discarded_and_counted(tag: str) -> None:
    with sire.region(tag):
        tensor = full(9)
    report = sire.pause(tag)
    assert report.bytes_copied == 0
    assert report.bytes_discarded >= SIZE
    assert "discarded" in str(report)
    sire.resume(tag)
    tensor.fill_(3)
    assert bool((tensor == 3).all())


def test_zero_fill(tag: str) -> None:
    with sire.region(tag, zero_fill=True):
        tensor = full(9)
    sire.pause(tag)
    report = sire.resume(tag)
    assert report.bytes_zeroed >= SIZE
    assert not bool(tensor.any())


def test_disk_backup(tag: str) -> None:
    with sire.region(tag, backup="disk"):
        tensor = full(77)
    sire.pause(tag)
    sire.resume(tag)
    assert bool((tensor == 77).all())


def test_a_model_computes_the_same_afterwards(tag: str) -> None:
    torch.manual_seed(0)
    with sire.region(tag, backup="cpu"):
        model = torch.nn.Sequential(
            torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.LayerNorm(1024), torch.nn.Linear(1024, 16)
        ).cuda()
    data = torch.randn(32, 256, device="cuda")
    with torch.no_grad():
        expected = model(data)
    addresses = [each.data_ptr() for each in model.parameters()]
    for _ in range(3):
        with sire.paused(tag):
            pass
        with torch.no_grad():
            assert torch.equal(model(data), expected)
        assert [each.data_ptr() for each in model.parameters()] == addresses


def test_training_goes_on_after_a_pause(tag: str) -> None:
    def train(pauses: bool) -> torch.Tensor:
        torch.manual_seed(1)
        with sire.region(tag, backup="cpu"):
            model = torch.nn.Linear(128, 128).cuda()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            data = torch.randn(64, 128, device="cuda")
        for _ in range(4):
            if pauses:
                with sire.paused(tag):
                    pass
            loss = (model(data) - data).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.weight.detach().cpu()

    assert torch.equal(train(pauses=True), train(pauses=False))


def test_tags_are_independent_and_hierarchical(tag: str) -> None:
    with sire.region(f"{tag}/a", backup="cpu"):
        one = full(1)
    with sire.region(f"{tag}/b", backup="cpu"):
        two = full(2)
    resident = device_used()
    sire.pause(f"{tag}/a")
    assert SIZE <= resident - device_used() < 2 * SIZE
    assert bool((two == 2).all())
    both = sire.pause(tag)
    assert (both.regions_changed, both.regions_unchanged) == (1, 1)
    assert resident - device_used() >= 2 * SIZE
    sire.resume(tag)
    assert bool((one == 1).all())
    assert bool((two == 2).all())


def test_freed_blocks_of_one_tag_are_not_reused_by_another(tag: str) -> None:
    with sire.region(f"{tag}/a"):
        temporary = full(1)
    del temporary
    with sire.region(f"{tag}/b", backup="cpu"):
        kept = full(2)
    outside = full(3)
    sire.pause(f"{tag}/a")
    assert bool((kept == 2).all())
    assert bool((outside == 3).all())


def test_small_tensors_of_two_tags_share_nothing(tag: str) -> None:
    with sire.region(f"{tag}/a", backup="cpu"):
        one = [torch.full((100,), n, device="cuda") for n in range(20)]
    with sire.region(f"{tag}/b", backup="cpu"):
        two = [torch.full((100,), n, device="cuda") for n in range(20)]
    with sire.paused(f"{tag}/a"):
        assert all(bool((each == n).all()) for n, each in enumerate(two))
    assert all(bool((each == n).all()) for n, each in enumerate(one))


def test_repetition_changes_nothing_and_says_so(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = full(5)
    assert not sire.resume(tag).changed
    assert sire.pause(tag).changed
    again = sire.pause(tag)
    assert not again.changed
    assert again.regions_unchanged == 1
    sire.resume(tag)
    assert bool((tensor == 5).all())


def test_an_empty_region_says_that_nothing_moved(tag: str) -> None:
    with sire.region(tag):
        pass
    report = sire.pause(tag)
    assert report.empty
    assert report.bytes_moved == 0


def test_freeing_while_paused(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        gone, stays = full(1), full(2)
    before = device_used()
    sire.pause(tag)
    del gone
    sire.resume(tag)
    assert bool((stays == 2).all())
    assert device_used() <= before


def test_keep_and_discard_override_the_region(tag: str) -> None:
    with sire.region(f"{tag}/none"):
        kept, lost = full(1), full(2)
    with sire.region(f"{tag}/cpu", backup="cpu"):
        saved, thrown = full(3), full(4)
    sire.keep(kept)
    sire.discard(thrown)
    report = sire.pause(tag)
    assert 2 * SIZE <= report.bytes_copied < 3 * SIZE
    assert report.bytes_discarded >= 2 * SIZE
    sire.resume(tag)
    assert bool((kept == 1).all())
    assert bool((saved == 3).all())
    del lost
    for wrong in (torch.ones(4), "tensor", saved[::2]):
        with pytest.raises(sire.InvalidArgumentError):
            sire.discard(wrong)
    with pytest.raises(sire.UnknownAddressError):
        sire.keep(stranger(lambda: full(1)))


def test_the_backup_can_be_read(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = torch.arange(SIZE // 4, dtype=torch.float32, device="cuda").reshape(16, -1)
    with sire.region(f"{tag}/none"):
        other = full(1)
    expected = tensor.cpu()
    sire.pause(tag)
    copy = sire.get_cpu_backup(tensor)
    part = sire.get_cpu_backup(tensor[3:5], zero_copy=True)
    assert torch.equal(copy, expected)
    assert torch.equal(part, expected[3:5])
    assert part.dtype == torch.float32
    assert sire.get_cpu_backup(other) is None
    sire.resume(tag)
    assert torch.equal(copy, expected)
    assert torch.equal(part, expected[3:5])
    with pytest.raises(sire.InvalidArgumentError, match="contiguous"):
        sire.get_cpu_backup(tensor.t())
    with pytest.raises(sire.UnknownAddressError):
        sire.get_cpu_backup(stranger(lambda: torch.ones(4, device="cuda")))


def test_stats_name_the_region(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = full(1)
    [region] = [each for each in sire.stats()["regions"] if each["tag"] == tag]
    assert region["state"] == "resident"
    assert region["resident_bytes"] >= SIZE
    assert region["backup"] == "host"
    with sire.paused(tag):
        [region] = [each for each in sire.stats()["regions"] if each["tag"] == tag]
        assert region["state"] == "paused"
        assert region["paused_bytes"] >= SIZE
        assert region["resident_bytes"] == 0
    del tensor


def test_out_of_memory_is_pytorchs_and_the_region_goes_on(tag: str) -> None:
    _, total = torch.cuda.mem_get_info()
    with sire.region(tag, backup="cpu"):
        with pytest.raises(torch.OutOfMemoryError):
            full(1, 2 * total)
        tensor = full(6)
    with sire.paused(tag):
        pass
    assert bool((tensor == 6).all())


@pytest.mark.skipif(not on_software_device(), reason="fills the device")
def test_resume_without_room_keeps_the_backup_and_can_be_repeated(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = full(8, 256 * MIB)
    sire.pause(tag)
    sire.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    thief = full(1, free - 64 * MIB)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        sire.resume(tag)
    assert isinstance(caught.value, sire.OutOfMemoryError)
    assert caught.value.status == 2
    assert sire.region(tag, backup="cpu").paused
    del thief
    torch.cuda.empty_cache()
    sire.resume(tag)
    assert bool((tensor == 8).all())
