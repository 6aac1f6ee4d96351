"""`sire.slyce` on a device that is half as large as the model (64 MiB; test_device_modes.py says so)."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
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
