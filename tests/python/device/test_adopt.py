"""Adopting a module: where its tensors are, that they are right, and what is copied.

What else is done with its tensors is in ``test_adopted_tensors.py``.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adopting
import pytest
import sire
import torch
from adopting import Net, assert_equal, state, twin, used
from sire import _library
from sire._adopt import Adopted, Mode, adopt, adopted_by

MIB = 1 << 20


@pytest.fixture
def adopted_ones() -> Iterator[list[Adopted]]:
    """As `adopting.released`."""
    yield from adopting.released()


@pytest.fixture(params=["view", "paused"])
def way(request: pytest.FixtureRequest) -> str:
    """Both ways of being offloaded."""
    return str(request.param)


def test_the_module_is_on_the_device_while_it_is_loaded(adopted_ones: list[Adopted], way: str) -> None:
    net, reference = Net().eval(), twin().eval()
    parameters = list(net.parameters())
    adopted = adopt(net, mode=way)  # type: ignore[arg-type]
    adopted_ones.append(adopted)
    assert not adopted.loaded
    assert {each.device.type for each in net.parameters()} == {"cpu"}
    x = torch.randn(4, 256)
    expected = reference(x)
    assert torch.equal(net(x), expected)
    addresses = None
    for _ in range(3):
        adopted.load()
        assert adopted.loaded
        assert all(each.is_cuda for each in [*net.parameters(), *net.buffers()])
        assert torch.allclose(net(x.cuda()).cpu(), expected, atol=1e-6)
        assert_equal(state(net), state(reference))
        now = [each.data_ptr() for each in net.parameters()]
        addresses = addresses or now
        assert now == addresses
        adopted.offload()
        assert not adopted.loaded
        if way == "view":
            assert {each.device.type for each in [*net.parameters(), *net.buffers()]} == {"cpu"}
            assert_equal(state(net), state(reference))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert net.tied.weight is net.one.weight


def test_memory_is_taken_once_and_given_back(adopted_ones: list[Adopted], way: str) -> None:
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    before = used()
    nets = [Net(i, width=1024) for i in range(5)]
    adopted_ones += [adopt(net, mode=way) for net in nets]  # type: ignore[arg-type]
    assert used() == before
    each_one = adopted_ones[0].nbytes
    parameters = {each.data_ptr(): each.numel() * 4 for each in [*nets[0].parameters(), nets[0].scale]}
    assert 0 < each_one - sum(parameters.values()) < 20 * 1024
    for number, adopted in enumerate(adopted_ones, 1):
        adopted.load()
        assert used() - before <= number * (each_one + 2 * MIB)
    for adopted in adopted_ones:
        adopted.offload()
    assert used() == before


def test_what_is_written_on_the_device_comes_back(adopted_ones: list[Adopted], way: str) -> None:
    net, reference = Net().train(), twin().train().cuda()
    # PyTorch's own move makes two tensors of it.
    reference.part = reference.norm.running_mean[:128]
    adopted = adopt(net, mode=way)  # type: ignore[arg-type]
    adopted_ones.append(adopted)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (net, reference)]
    for step in range(3):
        adopted.load()
        torch.manual_seed(step)
        x = torch.randn(8, 256, device="cuda")
        losses = []
        for each, optimizer in zip((net, reference), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            loss = each(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
        del loss
        assert_equal(state(net), state(reference))
        adopted.offload()
        if way == "view":
            assert_equal(state(net), state(reference))
            assert {each.grad.device.type for each in net.parameters() if each.grad is not None} == {"cpu"}


class _Statistics(torch.nn.Module):
    """Somebody's own normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(512, 512))
        self.register_buffer("mean", torch.zeros(512))
        self.register_buffer("variance", torch.ones(512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.batch_norm(x @ self.weight, self.mean, self.variance, training=True)  # type: ignore[arg-type]


def test_what_is_written_to_buffers_uncounted_comes_back(adopted_ones: list[Adopted], way: str) -> None:
    net, reference = _Statistics(), _Statistics().cuda()
    adopted = adopt(net, mode=way)  # type: ignore[arg-type]
    adopted_ones.append(adopted)
    x = torch.arange(8.0, device="cuda").repeat(512, 1).t()
    for _ in range(2):
        adopted.load()
        copied = adopted.bytes_copied
        with torch.no_grad():
            assert torch.equal(net(x), reference(x))
        adopted.offload()
        # The weight, which nobody has written to, is not copied.
        assert adopted.bytes_copied - copied == (sum(each.nbytes for each in net.buffers()) if way == "view" else 0)
    adopted.load()
    assert_equal(state(net), state(reference))


def test_averages_of_weights_come_back(adopted_ones: list[Adopted], way: str) -> None:
    """PyTorch writes to them without counting it."""
    net, twin_ = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64).cuda()
    twin_.load_state_dict(net.state_dict())
    averaged, reference = map(torch.optim.swa_utils.AveragedModel, (net, twin_))
    adopted_ones += [adopt(each, mode=way) for each in (net, averaged)]  # type: ignore[arg-type]
    for _ in range(3):
        for each in adopted_ones:
            each.load()
        for model, average in ((net, averaged), (twin_, reference)):
            with torch.no_grad():
                model.weight.add_(1)
            average.update_parameters(model)
        for each in adopted_ones:
            each.offload()
    adopted_ones[1].load()
    assert_equal(state(averaged), state(reference))


def test_clean_bytes_are_not_copied_back(adopted_ones: list[Adopted]) -> None:
    net = Net().eval()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    assert adopted.bytes_copied >= adopted.nbytes - 20 * 1024
    # PyTorch does not say whether it has written to these.
    little = sum(each.nbytes for each in (*net.norm.buffers(), net.scale))
    copied = adopted.bytes_copied
    net(torch.randn(4, 256).cuda())
    adopted.offload()
    assert adopted.bytes_copied - copied == little
    adopted.load()
    with torch.no_grad():
        net.two.bias.add_(1)
    copied = adopted.bytes_copied
    adopted.offload()
    assert adopted.bytes_copied - copied == little + net.two.bias.nbytes


def test_a_write_on_the_host_reaches_the_device(adopted_ones: list[Adopted]) -> None:
    net = Net()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    for release in ("eager", "lazy"):
        adopted.offload(release)  # type: ignore[arg-type]
        other = state(Net(seed=7 if release == "eager" else 8))
        net.load_state_dict(other, strict=False)
        adopted.load()
        assert_equal(state(net) | {"scale": other["scale"]}, other)


@pytest.mark.parametrize("times", [1, 2])
def test_a_saved_state_never_changes(adopted_ones: list[Adopted], times: int) -> None:
    """It did where the module had come and gone once more before it was written to."""
    net = Net()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    adopted.offload()
    saved = net.state_dict()
    copy = {name: each.clone() for name, each in saved.items()}
    for _ in range(times - 1):
        adopted.load()
        adopted.offload()
    adopted.load()
    with torch.no_grad():
        for each in net.parameters():
            each.add_(1)
    adopted.offload()
    assert_equal(saved, copy)
    assert torch.equal(net.two.bias, copy["two.bias"] + 1)


def test_lazily_released_memory_is_found_again(adopted_ones: list[Adopted]) -> None:
    net = Net(width=1024)
    before = state(net)
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    copied = adopted.bytes_copied
    adopted.offload("lazy")
    assert next(net.parameters()).device.type == "cpu"
    adopted.load()
    little = sum(each.nbytes for each in (*net.norm.buffers(), net.scale))
    assert adopted.bytes_copied - copied == 2 * little
    assert_equal(state(net), before)
    adopted.offload("lazy")
    sire.trim()
    adopted.load()
    assert adopted.bytes_copied - copied >= net.one.weight.nbytes
    assert_equal(state(net), before)


def test_a_lazy_pause_by_somebody_else_is_not_taken_for_ours(adopted_ones: list[Adopted]) -> None:
    """In between the memory was given back and brought back, without content."""
    net = Net(width=1024)
    before = state(net)
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    adopted.offload("lazy")
    sire.trim()
    sire.resume(adopted.tag)
    sire.pause(adopted.tag, release="lazy")
    adopted.load()
    assert_equal(state(net), before)


def test_a_pause_by_somebody_else_loses_nothing(adopted_ones: list[Adopted], way: str) -> None:
    net = Net()
    before = state(net)
    adopted = adopt(net, mode=way)  # type: ignore[arg-type]
    adopted_ones.append(adopted)
    adopted.load()
    with sire.paused(adopted.tag):
        pass
    assert_equal(state(net), before)
    sire.pause(adopted.tag)
    adopted.load()
    assert_equal(state(net), before)
    with torch.no_grad():
        net.two.bias.add_(1)
    sire.pause(adopted.tag)
    adopted.offload()
    adopted.load()
    assert torch.equal(net.two.bias.cpu(), before["two.bias"] + 1)
    adopted.offload()
    sire.resume(adopted.tag)
    adopted.load()
    assert torch.equal(net.one.weight.cpu(), before["one.weight"])


def test_no_room_changes_nothing(adopted_ones: list[Adopted], way: str) -> None:
    net = Net(width=2048)
    before = state(net)
    adopted = adopt(net, mode=way)  # type: ignore[arg-type]
    adopted_ones.append(adopted)
    for round_ in range(2):
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(free - adopted.nbytes // 2, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            adopted.load()
        assert not adopted.loaded
        if way == "view" or round_ == 0:
            assert_equal(state(net), before)
        del ballast
        torch.cuda.empty_cache()
        adopted.load()
        assert_equal(state(net), before)
        adopted.offload()


def room_of(size: int) -> torch.Tensor:
    """Leaves so many bytes of the device while it lives."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.empty(torch.cuda.mem_get_info()[0] - size, dtype=torch.uint8, device="cuda")


def test_other_weights_take_the_room_of_those_before(adopted_ones: list[Adopted], way: Mode) -> None:
    """Those before kept theirs until the others had come: above half of the device there was no room."""
    net = Net(width=2048)
    adopted = adopt(net, mode=way)
    adopted_ones.append(adopted)
    adopted.load()
    other = Net(seed=1, width=2048)
    ballast = room_of(8 * MIB)
    net.load_state_dict(other.state_dict(), assign=True)
    adopted.load()
    assert all(each.is_cuda for each in net.parameters())
    assert_equal({name: each.cpu() for name, each in net.state_dict().items()}, other.state_dict())
    del ballast


def test_a_part_that_finds_no_room_in_a_loaded_module_can_come_later(adopted_ones: list[Adopted], way: Mode) -> None:
    """The module counted as loaded with a part that was not, and could neither come nor go any more."""
    net, late = Net(), Net(seed=2, width=2048)
    adopted = adopt(net, mode=way)
    adopted_ones.append(adopted)
    expected = state(net) | {f"late.{name}": each for name, each in state(late).items()}
    adopted.load()
    net.late = late
    for leaves in (False, True):
        ballast = room_of(8 * MIB)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                adopted.load()
        if leaves:
            adopted.offload()
            assert not adopted.loaded
        del ballast
        torch.cuda.empty_cache()
        adopted.load()
        assert all(each.is_cuda for each in net.parameters())
        assert_equal(state(net), expected)
        net.late = None
        adopted.sync()
        net.late = late
    adopted.offload()
    adopted.load()
    assert_equal(state(net), expected)


def test_a_module_on_the_device_needs_no_second_room(
    adopted_ones: list[Adopted], way: str, expandable_segments: bool
) -> None:
    torch.zeros(1, device="cuda")
    net = Net(width=3072)
    before = state(net)
    net.cuda()
    free, _ = torch.cuda.mem_get_info()
    # Pieces of an expandable segment have 20 MiB, and go back whole.
    room = 48 * MIB if expandable_segments else 8 * MIB
    ballast = torch.empty(free - room, dtype=torch.uint8, device="cuda")
    adopted = adopt(net, mode=way)  # type: ignore[arg-type]
    adopted_ones.append(adopted)
    adopted.load()
    assert_equal(state(net), before)
    del ballast


def test_released_modules_are_ordinary(adopted_ones: list[Adopted], way: str) -> None:
    for loaded in (True, False):
        net = Net()
        before = state(net)
        adopted = adopt(net, mode=way)  # type: ignore[arg-type]
        adopted_ones.append(adopted)
        adopted.load()
        if not loaded:
            adopted.offload()
        adopted.release()
        assert adopted_by(net) is None
        with pytest.raises(sire.InvalidArgumentError, match="released"):
            adopted.load()
        assert_equal(state(net), before)
        net.cuda()
        assert_equal(state(net), before)
        again = adopt(net, mode=way)  # type: ignore[arg-type]
        adopted_ones.append(again)
        again.load()
        assert_equal(state(net), before)


def test_memory_goes_with_the_module() -> None:
    torch.zeros(1, device="cuda")
    before = used()
    net = Net(width=1024)
    adopted = adopt(net)
    adopted.load()
    weight = net.one.weight.detach()
    copy = weight.clone()
    adopted.release()
    del net, adopted
    gc.collect()
    assert torch.equal(weight, copy)
    del weight, copy
    gc.collect()
    assert used() == before


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A safetensors file, written by hand: eight bytes of length, a header, bytes."""
    import json

    net = Net(seed=5)
    table, content = {}, b""
    for name, tensor in net.state_dict().items():
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        raw = tensor.contiguous().numpy().tobytes()
        raw += b"\0" * (-len(raw) % 8)
        end = len(content) + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(content), end]}
        content += raw
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


@pytest.mark.parametrize("empty", [False, True])
def test_a_checkpoint_is_the_host_copy(adopted_ones: list[Adopted], way: str, checkpoint: Path, empty: bool) -> None:
    untied = Net(seed=9)
    if empty:
        scale = untied.scale
        untied = untied.to("meta")
        untied.scale = scale
    adopted = adopt(untied, mode=way, source=checkpoint)  # type: ignore[arg-type]
    adopted_ones.append(adopted)
    expected = Net(seed=5).state_dict()
    for _ in range(2):
        adopted.load()
        assert_equal({name: each.cpu() for name, each in untied.state_dict().items()}, expected)
        adopted.offload()
    written = checkpoint.read_bytes()
    if way == "view":
        with torch.no_grad():
            untied.two.bias.add_(1)
        adopted.load()
        assert torch.equal(untied.two.bias.cpu(), expected["two.bias"] + 1)
    assert checkpoint.read_bytes() == written
    with pytest.raises(sire.InvalidArgumentError, match="no file has it"):
        adopt(torch.nn.Linear(3, 3), source=checkpoint)


def test_restoring_undoes_writes_to_the_bit(adopted_ones: list[Adopted]) -> None:
    net = Net()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    before = state(net)
    adopted.load()
    with torch.no_grad():
        net.one.weight.mul_(1.1)
        net.two.weight.mul_(1.1)
    assert torch.equal(adopted.host(net.one.weight), before["one.weight"])
    adopted.restore(net.one.weight)
    assert torch.equal(net.one.weight.cpu(), before["one.weight"])
    assert not torch.equal(net.two.weight.cpu(), before["two.weight"])
    copied = adopted.bytes_copied
    adopted.offload()
    little = sum(each.nbytes for each in (*net.norm.buffers(), net.scale))
    assert adopted.bytes_copied - copied == little + net.two.weight.nbytes


def test_threads_meet(adopted_ones: list[Adopted]) -> None:
    net = Net()
    before = state(net)
    adopted = adopt(net)
    adopted_ones.append(adopted)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                adopted.load()
                adopted.offload()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failures == []
    assert_equal(state(net), before)


class BrokenError(Exception):
    """What the library is made to fail with."""


@pytest.mark.parametrize("release", ["eager", "lazy"])
def test_every_call_of_a_cycle_fails_once(
    adopted_ones: list[Adopted], monkeypatch: pytest.MonkeyPatch, release: str, way: str
) -> None:
    """Whatever call of the library's fails, nothing is lost, the state is one of the two, and the cycle works again."""
    plain = _library.Library._call
    left = [-1]

    def call(library: _library.Library, name: str, *arguments: Any) -> None:
        # A thread can always leave.
        left[0] -= name != "sire_region_leave"
        if left[0] == 0 and name != "sire_region_leave":
            raise BrokenError(name)
        plain(library, name, *arguments)

    monkeypatch.setattr(_library.Library, "_call", call)
    failed = set()
    for number in range(1, 100):
        net = Net(seed=number)
        expected = state(net)
        adopted = adopt(net, mode=way)  # type: ignore[arg-type]
        adopted_ones.append(adopted)
        left[0] = number
        try:
            adopted.load()
            with torch.no_grad():
                net.two.bias.add_(1)
                expected["two.bias"] = expected["two.bias"] + 1
            adopted.offload(release)  # type: ignore[arg-type]
            adopted.load()
            adopted.offload("eager")
            if release == "eager":  # begun and given up, begun and completed
                adopted.begin()
                adopted.offload()
                adopted.begin()
                adopted.load()
                adopted.offload()
        except BrokenError as error:
            failed.add(str(error))
        finished = left[0] > 0
        left[0] = -1
        if way == "view":
            assert {each.is_cuda for each in net.parameters()} == {adopted.loaded}, number
            assert_equal(state(net), expected)
        adopted.load()
        assert_equal(state(net), expected)
        adopted.offload()
        adopted.load()
        assert_equal(state(net), expected)
        adopted.release()
        if finished:
            break
    assert finished, "there are more calls than were tried"
    assert failed >= {"sire_region_enter_on", "sire_allocate", "sire_pause", "sire_resume"}


def test_host_memory_and_the_disk_have_an_end() -> None:
    program = """
import gc, os, torch, sire
from sire.models import adopt
net = torch.nn.Linear(1024, 1024)
before = net.weight.detach().clone()
first = adopt(torch.nn.Linear(512, 512))
try:
    adopt(net)
except sire.OutOfBackupSpaceError as error:
    assert "SIRE_HOST_LIMIT" in str(error), error
else:
    raise SystemExit("the limit was passed")
assert torch.equal(net.weight, before)
adopted = adopt(net, backup="disk")
adopted.load()
assert torch.equal(net.weight.cpu(), before)
adopted.offload()
adopted.release()
# A directory that is not there is made, but not there.
os.environ["SIRE_DISK_DIR"] = "/proc/missing"
try:
    adopt(net, backup="disk")
except sire.OutOfBackupSpaceError as error:
    assert "/proc/missing" in str(error), error
else:
    raise SystemExit("the disk was not asked")
assert torch.equal(net.weight, before)
del first
gc.collect()
adopt(torch.nn.Linear(512, 512))
"""
    environment = dict(os.environ) | {"SIRE_HOST_LIMIT": "4MiB"}
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_disk_is_a_place_too(adopted_ones: list[Adopted], way: str) -> None:
    net = Net(width=512)
    before = state(net)
    adopted = adopt(net, mode=way, backup="disk", mutable=True)  # type: ignore[arg-type]
    adopted_ones.append(adopted)
    for _ in range(2):
        adopted.load()
        assert_equal(state(net), before)
        adopted.offload()
    if way == "view":
        assert_equal(state(net), before)
    assert _library.load().stats()
