"""Which tensors are in a region: nesting, threads, disable, other devices, and misuse."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import sire
import torch
from measure import MIB, device_used, on_software_device, region_bytes, stranger
from sire import _library, _torch

SIZE = 8 * MIB


def full(value: int, size: int = SIZE) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8, device="cuda")


def owned(tensor: torch.Tensor) -> bool:
    """Whether it is in a region that somebody has opened: a whole-process allocator has one for everything else."""
    return _library.load().owns(tensor.data_ptr()) and tag_of(tensor) != "default"


def tag_of(tensor: torch.Tensor) -> str:
    number = _library.load().allocation(tensor.data_ptr()).region
    [region] = [each for each in sire.stats()["regions"] if each["region"] == number]
    return str(region["tag"])


def test_only_what_is_made_inside_is_in_the_region(tag: str) -> None:
    before = full(1)
    with sire.region(tag):
        inside = full(2)
    after = full(3)
    assert owned(inside)
    assert not owned(before)
    assert not owned(after)
    assert tag_of(inside) == tag


def test_nested_regions(tag: str) -> None:
    outer, inner = sire.region(f"{tag}/outer"), sire.region(f"{tag}/inner")
    with outer:
        one = full(1)
        with inner:
            two = full(2)
            with outer, outer:
                three = full(3)
            four = full(4)
        five = full(5)
    assert [tag_of(each).rpartition("/")[2] for each in (one, two, three, four, five)] == [
        "outer",
        "inner",
        "outer",
        "inner",
        "outer",
    ]
    assert not owned(full(6))
    for value, tensor in enumerate((one, two, three, four, five), start=1):
        assert bool((tensor == value).all())


def test_the_same_tag_with_two_policies(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        kept = full(1)
    with sire.region(tag):
        lost = full(2)
    report = sire.pause(tag)
    assert report.regions_changed == 2
    assert report.bytes_discarded >= SIZE
    sire.resume(tag)
    assert bool((kept == 1).all())
    assert tag_of(lost) == tag


def test_threads_in_the_same_region_at_the_same_time(tag: str) -> None:
    inside = threading.Barrier(4)
    made: dict[int, list[torch.Tensor]] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with sire.region(tag, backup="cpu"):
                inside.wait(30)
                made[number] = [full(number, MIB * 4) for _ in range(5)]
                inside.wait(30)
        except BaseException as error:
            errors.append(error)
            inside.abort()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert errors == []
    with sire.paused(tag):
        assert region_bytes(tag)["resident_bytes"] == 0
    for number, tensors in made.items():
        assert all(tag_of(each) == tag for each in tensors)
        assert all(bool((each == number).all()) for each in tensors)


def test_other_threads_are_not_inside(tag: str) -> None:
    made: list[torch.Tensor] = []
    with sire.region(tag):
        thread = threading.Thread(target=lambda: made.append(full(1)))
        thread.start()
        thread.join()
    assert not owned(made[0])


def test_pausing_while_a_thread_is_inside_is_refused_by_name(tag: str) -> None:
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with sire.region(tag):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert entered.wait(30)
        with pytest.raises(sire.BusyError, match=tag):
            sire.pause(tag)
    finally:
        leave.set()
        thread.join()
    assert sire.pause(tag).changed


def test_entering_a_paused_region(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = full(4)
    sire.pause(tag)
    with pytest.raises(sire.PausedError, match=tag), sire.region(tag, backup="cpu"):
        pytest.fail("entered")
    assert not owned(full(1))
    with sire.region(tag, backup="cpu", on_paused="resume"):
        other = full(5)
    assert bool((tensor == 4).all())
    assert bool((other == 5).all())


def test_exceptions_leave_the_region(tag: str) -> None:
    with pytest.raises(ZeroDivisionError), sire.region(tag):
        raise ZeroDivisionError
    assert not owned(full(1))
    assert sire.pause(tag).changed


def test_decorated_functions_allocate_in_the_region(tag: str) -> None:
    @sire.region(tag)
    def make() -> torch.Tensor:
        return full(1)

    assert tag_of(make()) == tag


def test_disable(tag: str) -> None:
    with sire.region(tag):
        inside = full(1)
        before = device_used()
        with sire.disable():
            outside = full(2, 64 * MIB)
            assert not owned(outside)
        again = full(3)
        del outside
        # Older PyTorch cannot drop a pool beside others: there the memory goes when the region is left.
        if _torch._may_drop_beside_others(torch):
            assert device_used() - before < 64 * MIB
    assert device_used() - before < 64 * MIB
    assert owned(inside)
    assert owned(again)
    with sire.paused(tag), sire.disable():
        assert int(full(7)[0]) == 7


def test_a_region_inside_disable(tag: str) -> None:
    # A library that opens regions of its own, called by somebody who wants none: leaving the region raised
    # InactiveError, and the memory stayed in the region's pool, where its next tensors would have had it.
    with sire.disable(), sire.region(tag, backup="cpu"):
        outside = full(1, 4 * MIB)
        with sire.region(f"{tag}/inner"):
            also = full(2, 4 * MIB)
    assert not owned(outside)
    assert not owned(also)
    del outside
    with sire.region(tag, backup="cpu"):
        inside = full(3, 4 * MIB)
    assert owned(inside)
    with sire.paused(tag):
        assert int(also[0]) == 2
    assert int(inside[0]) == 3


TWO_DEVICES = """
import os
import sire, torch
from sire import _library
if os.environ["SIRE_TEST_MODE"] == "allocator":
    sire.use_allocator()

def made(device):
    tensor = torch.full((1 << 20,), 2.0, device=f"cuda:{device}")
    library, regions = _library.load(), sire.stats()["regions"]
    if not library.owns(tensor.data_ptr()):
        return tensor, None
    number = library.allocation(tensor.data_ptr()).region
    tags = [each["tag"] for each in regions if each["region"] == number]
    return tensor, None if tags == ["default"] else tags[0]

tensors = []
with sire.region("w", device=1):
    tensors.append(made(1))
    with sire.disable():
        tensors += [made(1), made(0)]
        with torch.cuda.device(1):
            tensors += [made(1), made(0)]
    tensors.append(made(1))
with torch.cuda.device(1), sire.region("w", device=0), sire.disable():
    tensors += [made(0), made(1)]
print([tag for _, tag in tensors], torch.cuda.current_device())
sire.pause()
print(all(float(tensor.sum()) == 2 << 20 for tensor, tag in tensors if tag is None))
"""


def test_disable_holds_on_every_device() -> None:
    """On a device that was not the current one, tensors were the region's, and its pause took them."""
    if not on_software_device():
        pytest.skip("there may be one device only")
    variables = os.environ | {"SIRE_SIM_DEVICES": "2", "SIRE_SIM_MEMORY": "512MiB"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES], env=variables, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = ["w", None, None, None, None, "w", None, None]
    assert done.stdout.splitlines() == [f"{expected} 0", "True"]


MADE = TWO_DEVICES.partition("tensors = []")[0]
OTHER_DEVICES = """
tensors = []
with sire.region("w", device=1):
    tensors += [made(1), made(0)]
with sire.region("outer"), sire.region("inner", device=1):
    tensors += [made(0), made(1)]
after = [made(0), made(1)]
print([tag for _, tag in tensors + after])
sire.pause("w")
sire.pause("inner")
print(all(float(tensor.sum()) == 2 << 20 for tensor, tag in tensors + after if tag in (None, "outer")))
"""


def test_a_region_holds_nothing_of_other_devices(mode: str) -> None:
    """PyTorch took it from a pool that goes on after the region, and gave it to tensors outside: a pause took those."""
    if not on_software_device():
        pytest.skip("there may be one device only")
    variables = os.environ | {"SIRE_SIM_DEVICES": "2", "SIRE_SIM_MEMORY": "512MiB"}
    command = [sys.executable, "-c", MADE + OTHER_DEVICES]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    # Our own cache keeps regions apart on every device.
    others = ["w", "inner"] if mode == "allocator" else [None, "outer"]
    assert done.stdout.splitlines() == [str(["w", others[0], others[1], "inner", None, None]), "True"]


def test_a_device_can_be_named(tag: str) -> None:
    for device in (0, "cuda", "cuda:0", torch.device("cuda", 0)):
        with sire.region(tag, device=device):
            assert owned(full(1))
    for wrong in ("cpu", "cuda:63", 63, "nonsense", object()):
        with pytest.raises(sire.InvalidArgumentError), sire.region(tag, device=wrong):
            pytest.fail("entered")
    assert not owned(full(1))


def test_a_pool_per_tag_is_reused(tag: str) -> None:
    from sire import _torch

    before = len(_torch._shelves)
    for _ in range(5):
        with sire.region(tag):
            full(1)
    assert len(_torch._shelves) == before + 1
    assert region_bytes(tag)["resident_bytes"] < 4 * SIZE


def test_memory_without_pytorch(tag: str) -> None:
    library = _library.load()
    with sire.region(tag, backup="cpu"):
        pointer = library.allocate(3 * MIB, 0)
        assert library.allocation(pointer).size >= 3 * MIB
    report = sire.pause(tag)
    assert report.allocations == 1
    sire.resume(tag)
    library.free(pointer)
    with pytest.raises(sire.UnknownAddressError):
        library.free(pointer)
    with pytest.raises(sire.SireError):
        library.allocate(MIB, 0)


def test_foreign_pointers_are_refused() -> None:
    library = _library.load()
    buffer = ctypes.create_string_buffer(16)
    for address in (ctypes.addressof(buffer), 0x1234, stranger(lambda: full(1)).data_ptr()):
        assert not library.owns(address)
        for call in (library.free, library.allocation):
            with pytest.raises(sire.UnknownAddressError):
                call(address)
        with pytest.raises(sire.UnknownAddressError):
            library.keep(address, 16)


@pytest.mark.parametrize("wrong", ["/a", "a//b", "a/", "a\nb" * 100, "ä" * 200])
def test_malformed_tags_are_refused(wrong: str) -> None:
    with pytest.raises(sire.InvalidArgumentError), sire.region(wrong):
        pytest.fail("entered")


def test_unknown_tags_are_errors() -> None:
    for call in (sire.pause, sire.resume):
        with pytest.raises(sire.UnknownTagError, match="nobody/uses/this"):
            call("nobody/uses/this")
