"""`sire.slyce` on a device that is half as large as the model (64 MiB; test_device_modes.py says so)."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sire
import torch
from sire._adopt import adopt
from sire.slyce import SlyceModel
from sire.slyce.models import TransformerStack
from torch import nn

WIDTH = 1024
PARTS = 8
PART_BYTES = 4 * 4 * (WIDTH * WIDTH + WIDTH)
CUDA = torch.device("cuda", 0)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the bit on the software device; a GPU sums in another order."""
    exact = "software" in torch.cuda.get_device_name()
    return torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.fixture
def small_device() -> None:
    """Skips a test where the device is not half as large as the model."""
    if 2 * torch.cuda.mem_get_info()[1] > PARTS * PART_BYTES:
        pytest.skip("the device is not small enough for this test")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leaves nothing on the device. What slices paused must not be resumed all at once: it would not fit."""
    yield
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def part(seed: int) -> nn.Sequential:
    """16 MiB of weights."""
    torch.manual_seed(seed)
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])


def sliced(count: int = PARTS, **options: object) -> SlyceModel:
    slices = [{"name": f"part{i}", "constructor": part, "config": i} for i in range(count)]
    return SlyceModel(slices, log_to_console=False, **options)


def whole(count: int = PARTS) -> nn.Sequential:
    return nn.Sequential(*[part(i) for i in range(count)])


@pytest.mark.parametrize(
    "options",
    [
        {"gpu_strategy": "none"},
        {"gpu_strategy": "active_only"},
        {"gpu_strategy": "limit_gpu", "max_gpu_mem_mb": 36},
        {"gpu_strategy": "limit_gpu", "max_gpu_mem_mb": 36, "prefetch": False},
    ],
)
@pytest.mark.usefixtures("small_device")
def test_a_model_twice_the_device_runs_under_every_strategy(options: dict[str, object]) -> None:
    model, x = sliced(**options), torch.randn(2, WIDTH)
    with torch.no_grad():
        expected = whole()(x)
        for _ in range(2):
            result = model.run_pipeline(x)
            assert same(result.cpu(), expected)
    assert result.device.type == ("cpu" if options["gpu_strategy"] == "none" else "cuda")
    model.manager.settle()
    summary = model.summary()
    allowed = {"none": 0, "active_only": PART_BYTES, "limit_gpu": 36 << 20}[str(options["gpu_strategy"])]
    assert summary.gpu_bytes <= allowed
    assert summary.gpu_bytes + summary.cpu_bytes == PARTS * PART_BYTES
    if options["gpu_strategy"] == "limit_gpu" and options.get("prefetch", True):
        assert summary.prefetches > 0
    model.close()


@pytest.mark.usefixtures("small_device")
def test_a_model_twice_the_device_trains_in_slices() -> None:
    model, twin = sliced(gpu_strategy="active_only").construct_all(), whole()
    torch.manual_seed(1)
    x, y = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    mine, other = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, twin))
    for _ in range(2):
        mine.zero_grad()
        other.zero_grad()
        loss = nn.functional.mse_loss(model.run_pipeline(x), y.cuda())
        loss.backward()
        mine.step()
        expected = nn.functional.mse_loss(twin(x), y)
        expected.backward()
        other.step()
        assert loss.item() == expected.item()
    for name, value in twin.state_dict().items():
        number, rest = name.split(".", 1)
        assert same(model.state_dict()[f"slices.part{number}.{rest}"].cpu(), value), name
    model.close()


def test_a_trained_slice_keeps_its_state_on_its_way_to_the_disk_and_back(tmp_path: Path) -> None:
    model = sliced(2, gpu_strategy="active_only", disk_cache_path=tmp_path)
    with torch.no_grad():
        model.slice("part0")[0].weight.fill_(0.25)
        first = model(torch.ones(1, WIDTH), active_slice="part0").cpu()
        model.set_active_slice("part1")
        assert model.summary().slices[0].tier == "cpu"
        model.offload_slice("part0")
        assert model.summary().disk_bytes == PART_BYTES
        assert same(model(torch.ones(1, WIDTH), active_slice="part0").cpu(), first)
    assert (tmp_path / "slyce.log").read_text().count("part0") >= 3
    model.close()
    assert not list(tmp_path.glob("sire-units-*"))


def test_a_slice_larger_than_the_limit_runs_on_the_cpu() -> None:
    model, x = sliced(1, gpu_strategy="limit_gpu", max_gpu_mem_mb=8), torch.ones(1, WIDTH)
    with torch.no_grad():
        result = model(x)
        assert result.device.type == "cpu"
        assert same(result, whole(1)(x))


def test_sending_the_model_elsewhere_moves_nothing_and_converts_what_is_made_later() -> None:
    model = sliced(2, gpu_strategy="limit_gpu", max_gpu_mem_mb=40)
    model.slice("part0")
    model.to("cpu").to("cuda").to(torch.bfloat16)
    assert model.summary().gpu_bytes == 0
    with torch.no_grad():
        result = model.run_pipeline(torch.ones(1, WIDTH, dtype=torch.bfloat16))
        assert result.device == CUDA
        assert result.dtype == torch.bfloat16
        assert same(
            result.cpu(), copy.deepcopy(whole(2)).to(torch.bfloat16)(torch.ones(1, WIDTH, dtype=torch.bfloat16))
        )


@pytest.mark.parametrize("strategy", ["none", "active_only"])
def test_state_comes_after_the_conversions_that_the_model_had_before_it(strategy: str) -> None:
    """A slice that was made later took its state first, and was converted then: emptied, or cut to fewer digits."""

    def model() -> SlyceModel:
        slices = [{"name": "line", "constructor": nn.Linear, "config": (4, 4)}]
        return SlyceModel(slices, gpu_strategy=strategy, log_to_console=False)

    state = {"line": {"weight": torch.rand(4, 4).double() / 3, "bias": torch.rand(4).double() / 3}}
    for change in (lambda each: each.double().to_empty(device="cpu"), lambda each: each.double()):
        changed = change(model())
        changed.load_state_dict(state)
        assert torch.equal(changed.slice("line").weight.cpu(), state["line"]["weight"])
    refused = model()
    refused.load_state_dict({"line": {}})
    with pytest.raises(RuntimeError, match="Missing key"):
        refused.slice("line")
    refused.load_state_dict(state)
    assert torch.equal(refused.slice("line").weight.cpu(), state["line"]["weight"].float())


def test_a_slice_that_offloading_made_is_converted_once_with_the_model() -> None:
    model = sliced(2, gpu_strategy="limit_gpu", max_gpu_mem_mb=40)
    model.half()
    model.manager.load("part0")
    model.to(torch.bfloat16)
    for name in model.slice_names:
        assert {each.dtype for each in model.slice(name).parameters()} == {torch.bfloat16}


def test_a_model_that_is_sent_somewhere_again_and_again_remembers_the_last_time() -> None:
    """Slices that were made later were sent along the whole way, which grew with every call."""
    model = sliced(1, gpu_strategy="active_only").to(torch.bfloat16)
    for _ in range(3):
        model.cpu().to("cuda").cuda()
    assert len(model.manager.conversions) == 2
    model.to(memory_format=torch.channels_last).cpu().to(CUDA)
    assert len(model.manager.conversions) == 4
    with torch.no_grad():
        assert model(torch.ones(1, WIDTH, dtype=torch.bfloat16)).device == CUDA


def test_a_model_with_slices_inside_another_is_sent_somewhere_again_and_again() -> None:
    """The second time raised AttributeError, once anything had been adopted."""
    adopt(nn.Linear(2, 2)).release()
    model = sliced(1, gpu_strategy="active_only")
    outer = nn.Sequential(model, nn.Linear(WIDTH, 2))
    for _ in range(3):
        outer.cpu().to("cuda")
    assert len(model.manager.conversions) == 1
    with torch.no_grad():
        assert outer(torch.ones(1, WIDTH)).device == CUDA


def test_background_loading_and_offloading() -> None:
    model = sliced(2, gpu_strategy="limit_gpu", max_gpu_mem_mb=40)
    assert model.preload("part1").result() is True
    assert model.summary().slices[1].tier == "gpu"
    done = model.offload_slice("part1", non_blocking=True)
    assert done is not None
    done.result()
    assert model.summary().slices[1].tier == "cpu"


def test_a_ready_made_stack_is_the_plain_stack() -> None:
    options = {"dim_feedforward": 128, "batch_first": True, "dropout": 0.0}
    model = TransformerStack(3, 64, 4, layer_options=options, gpu_strategy="active_only", log_to_console=False)
    model.construct_all()
    twin = nn.Sequential(*[nn.TransformerEncoderLayer(64, 4, **options) for _ in range(3)])
    for i, layer in enumerate(twin):
        layer.load_state_dict(model.slice(f"layers_{i}").layers[0].state_dict())
    x = torch.randn(2, 5, 64)
    assert torch.allclose(model(x).cpu(), twin(x), atol=1e-5)


# --- slices that need no device ------------------------------------------------------------------------------------


def test_slices_have_signatures_of_their_own_and_are_made_when_they_are_used() -> None:
    made: list[str] = []

    class Adds(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            made.append("adds")
            self.by = nn.Parameter(torch.tensor([by]))

        def forward(self, one: torch.Tensor, *, other: torch.Tensor) -> torch.Tensor:
            return one + other + self.by

    model = SlyceModel(
        [
            {"name": "adds", "constructor": Adds, "config": 2.0},
            {"name": "line", "constructor": nn.Linear, "config": (4, 2)},
        ],
        log_to_console=False,
    )
    assert made == []
    assert [each.tier for each in model.summary().slices] == ["not made", "not made"]
    assert torch.equal(model(torch.ones(4), other=torch.ones(4)), torch.full((4,), 4.0))
    assert model(torch.ones(4), active_slice="line").shape == (2,)
    assert model.active_slice == "line"
    assert list(model.state_dict()) == ["slices.adds.by", "slices.line.weight", "slices.line.bias"]
    model.reset_slice("adds")
    model(torch.ones(4), other=torch.ones(4), active_slice="adds")
    assert made == ["adds", "adds"]


@pytest.mark.parametrize("trains", [False, True])
def test_slices_that_are_made_later_need_gradients_as_the_model_does(trains: bool) -> None:
    """A frozen model had slices that trained: those that were made afterwards."""

    def line(frozen: bool) -> nn.Linear:
        return nn.Linear(4, 4).requires_grad_(not frozen)

    slices = [{"name": name, "constructor": line, "config": (trains,)} for name in ("one", "two", "three")]
    model, x = SlyceModel(slices, log_to_console=False), torch.ones(1, 4)
    model.slice("one")
    model.manager.made("two")
    assert {each.requires_grad for each in model.slice("one").parameters()} == {not trains}
    assert model.requires_grad_(trains) is model
    model.reset_slice("one")
    model.run_pipeline(x)
    assert {each.requires_grad for each in model.parameters()} == {trains}
    assert model.run_slice("three", x).requires_grad is trains


def test_state_is_saved_and_loaded_also_before_slices_are_made(tmp_path: Path) -> None:
    slices = [{"name": name, "constructor": nn.Linear, "config": (4, 4)} for name in ("one", "two")]
    model = SlyceModel(slices, log_to_console=False).construct_all()
    model.save_state_dict(tmp_path / "state.pt")
    for source in (tmp_path / "state.pt", model.state_dict()):
        other = SlyceModel(slices, log_to_console=False)
        other.slice("one")
        other.load_state_dict(source)
        for name in ("one", "two"):
            assert torch.equal(other.slice(name).weight, model.slice(name).weight)
    with pytest.raises(sire.InvalidArgumentError, match="three"):
        model.load_state_dict({"three": {}})


def test_state_of_slices_that_are_not_made_yet_is_saved_again() -> None:
    """`state_dict` had the slices that were made through the model: whoever loaded and saved lost the others."""
    slices = [{"name": name, "constructor": nn.Linear, "config": (4, 4)} for name in ("one", "two", "three")]
    first = SlyceModel(slices, log_to_console=False).construct_all()
    between, last = (SlyceModel(slices, log_to_console=False) for _ in range(2))
    between.load_state_dict(first.state_dict())
    between.manager.made("one")
    between.slice("two")
    saved = nn.ModuleDict({"model": between}).state_dict(prefix="the.")
    assert saved.keys() == {f"the.model.{key}" for key in first.state_dict()}
    found = last.load_state_dict({key.removeprefix("the.model."): value for key, value in saved.items()})
    assert str(found) == "<All keys matched successfully>"
    for key, value in first.state_dict().items():
        assert torch.equal(last.construct_all().state_dict()[key], value)


def test_slices_without_any_state_are_missing_in_a_flat_one_and_may_be_in_one_by_slices() -> None:
    slices = [
        {"name": "one", "constructor": nn.Linear, "config": (4, 4)},
        {"name": "two", "constructor": nn.Linear, "config": (4, 4)},
        {"name": "plain", "constructor": nn.Tanh},
    ]
    model = SlyceModel(slices, log_to_console=False)
    model.slice("one")
    model.slice("plain")
    state = model.state_dict()
    other = SlyceModel(slices, log_to_console=False)
    other.slice("plain")
    assert other.load_state_dict(state).missing_keys == ["slices.two"]
    other.slice("two")
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)
    assert set(other.load_state_dict(state, strict=False).missing_keys) == {"slices.two.weight", "slices.two.bias"}
    assert other.load_state_dict(model.slice_states()).missing_keys == []


def test_state_for_a_slice_that_is_not_made_yet_is_what_it_was_when_it_was_loaded() -> None:
    """The tensors were the caller's: training went on in them, and the snapshot with it. ``strict`` was forgotten."""
    slices = [{"name": "one", "constructor": nn.Linear, "config": (2, 2)}]
    live = SlyceModel(slices, log_to_console=False).construct_all()
    snapshot = SlyceModel(slices, log_to_console=False)
    snapshot.load_state_dict(live.state_dict())
    expected = live.slice("one").weight.detach().clone()
    with torch.no_grad():
        live.slice("one").weight.add_(1)
    assert torch.equal(snapshot.slice("one").weight, expected)
    part = {"one": {"weight": torch.full((2, 2), 3.0)}}
    for strict in (True, False):
        other = SlyceModel(slices, log_to_console=False)
        other.load_state_dict(part, strict=strict)
        with pytest.raises(RuntimeError, match="bias") if strict else nullcontext():
            assert bool((other.slice("one").weight == 3).all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"slices": []},
        {"slices": [{"name": "a.b", "constructor": nn.Linear}]},
        {"slices": [{"name": "a"}]},
        {"slices": [{"name": "a", "constructor": nn.Linear}] * 2},
        {"gpu_strategy": "sometimes"},
        {"max_gpu_mem_mb": 0},
        {"max_cpu_mem_mb": 5},
        {"log_level": "LOUD"},
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    arguments = {"slices": [{"name": "a", "constructor": nn.Linear, "config": (1, 1)}], "log_to_console": False} | wrong
    with pytest.raises(sire.InvalidArgumentError):
        SlyceModel(**arguments)


def test_host_memory_has_a_limit_of_its_own(tmp_path: Path) -> None:
    slices = [{"name": str(i), "constructor": nn.Linear, "config": (256, 256)} for i in range(4)]
    model = SlyceModel(slices, disk_cache_path=tmp_path, max_cpu_mem_mb=0.6, log_to_console=False)
    x = torch.randn(1, 256)
    model.construct_all()
    expected = [model.run_slice(str(i), x) for i in range(4)]
    summary = model.summary()
    assert summary.cpu_bytes <= 0.6 * 2**20
    assert summary.disk_bytes >= 2 * 4 * 256 * 256
    for i in (2, 0, 3, 1):
        assert torch.equal(model.run_slice(str(i), x), expected[i])
    model.close()
