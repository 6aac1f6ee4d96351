"""LoRA as a commit: names, merging with one rounding, and the side path beside layers that nothing is merged into."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import sire
import torch
from patched import WIDTH, lora, small
from sire.models.commits import (
    CommitObjectProxy,
    LoraCommit,
)
from torch import nn


def write_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    header, content = {}, b""
    for name, value in state.items():
        data = bytes(value.contiguous().view(-1).view(torch.uint8).tolist())
        dtype = {torch.float32: "F32", torch.float16: "F16"}[value.dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [len(content), len(content) + len(data)],
        }
        content += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"),
        ("0.lora_A.default.weight", "0.lora_B.default.weight"),
        ("lora_unet_0.lora_down.weight", "lora_unet_0.lora_up.weight"),
        ("transformer.0.lora.down.weight", "transformer.0.lora.up.weight"),
    ],
)
def test_a_lora_is_merged_in_fp32_with_one_rounding(tmp_path: Path, down: str, up: str) -> None:
    model = small()
    a, b = torch.randn(4, WIDTH), torch.randn(WIDTH, 4)
    expected = (model[0].weight.float() + (b @ a) * 0.5).to(torch.bfloat16)
    write_safetensors(tmp_path / "lora.safetensors", {down: a, up: b})
    with CommitObjectProxy(model).add_commit(LoraCommit(tmp_path / "lora.safetensors", scale=0.5)):
        assert torch.equal(model[0].weight, expected)


def test_alpha_and_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    a, b = torch.randn(2, 3, 3, 3), torch.randn(8, 2, 1, 1)
    before = model[0].weight.detach().clone()
    state = {"lora_unet_0.lora_down.weight": a, "lora_unet_0.lora_up.weight": b, "lora_unet_0.alpha": torch.tensor(1.0)}
    expected = before + (b.flatten(1) @ a.flatten(1)).reshape(before.shape) * 0.5
    with CommitObjectProxy(model).add_commit(LoraCommit(state)):
        assert torch.equal(model[0].weight, expected)


@pytest.mark.parametrize("mode", ["merge", "side"])
@pytest.mark.parametrize("out", [WIDTH, 2 * WIDTH])
def test_a_weight_with_a_row_per_input_gets_the_turned_delta(mode: Any, out: int) -> None:
    """The Conv1D of transformers. Square ones got the delta as it was, and nothing said so."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.nx = out, WIDTH
            self.weight = nn.Parameter(torch.randn(WIDTH, out))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    model, x = nn.Sequential(Conv1D()), torch.randn(2, WIDTH)
    a, b = torch.randn(4, WIDTH), torch.randn(out, 4)
    with torch.no_grad():
        plain = model(x)
        commit = LoraCommit({"0.lora_A.weight": a, "0.lora_B.weight": b}, scale=0.5, mode=mode)
        with CommitObjectProxy(model).add_commit(commit):
            assert torch.allclose(model(x), plain + 0.5 * (x @ a.t() @ b.t()), atol=1e-4)


def test_a_quantized_layer_gets_a_side_path() -> None:
    class Quantized(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.step = weight.abs().max() / 127
            self.register_buffer("weight", (weight / self.step).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.float() * self.step)

    model = nn.Sequential(Quantized(torch.randn(WIDTH, WIDTH)))
    state, x = lora(3, names=("0",)), torch.randn(2, WIDTH)
    a, b = state.values()
    plain, weight = model(x), model[0].weight.clone()
    proxy = CommitObjectProxy(model).add_commit(LoraCommit(state, scale=2.0))
    with proxy:
        assert torch.allclose(model(x), plain + 2.0 * (x @ a.t() @ b.t()), atol=1e-4)
        assert torch.equal(model[0].weight, weight)
    proxy.revert_all()
    assert torch.equal(model(x), plain)
    with pytest.raises(sire.UnsupportedError, match="cannot be merged"):
        CommitObjectProxy(model).add_commit(LoraCommit(state, mode="merge")).apply_commit_stack()


CONVOLUTIONS = [
    nn.Conv2d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 5, 3, padding=(1, 0), dilation=2, padding_mode="reflect"),
    nn.Conv1d(3, 5, 3),
    nn.Conv2d(3, 5, 1),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("is_batch", [True, False], ids=["batch", "one"])
def test_a_side_path_beside_a_convolution_is_what_merging_gives(layer: nn.Module, is_batch: bool) -> None:
    """It was accepted, and then every forward raised."""
    model = nn.Sequential(copy.deepcopy(layer))
    down = torch.randn(2, *model[0].weight.shape[1:])
    state = {"0.lora_A.weight": down, "0.lora_B.weight": torch.randn(5, 2, *[1] * (down.dim() - 2))}
    x = torch.randn(*[2] * is_batch, 3, *[9] * (down.dim() - 2))
    with CommitObjectProxy(model).add_commit(LoraCommit(state, scale=0.5)) as merged:
        expected = merged(x)
    with CommitObjectProxy(model).add_commit(LoraCommit(state, scale=0.5, mode="side")) as beside:
        assert torch.allclose(beside(x), expected, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3)], ids=str)
def test_a_layer_beside_which_no_lora_can_run_is_refused_when_it_is_applied(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    columns = layer.weight.shape[1]
    state = {"0.lora_A.weight": torch.ones(2, columns, 3, 3), "0.lora_B.weight": torch.ones(4, 2, 1, 1)}
    said = r"'0' is a Conv.* whose weight is not merged into, and beside which no LoRA can run"
    with pytest.raises(sire.UnsupportedError, match=said):
        CommitObjectProxy(model).add_commit(LoraCommit(state, mode="side")).apply_commit_stack()
    assert not layer._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_side_path_serves_inference_training_and_inputs_by_name(dtype: torch.dtype) -> None:
    """Matrices that were made in inference mode were kept, and could not be used with gradients afterwards; a layer
    that was called with its input by name raised.
    """
    model = small(torch.float32)
    with torch.inference_mode():
        state = {name: each.to(dtype, copy=True) for name, each in lora(3, names=("0",)).items()}
    x = torch.randn(2, WIDTH)
    with CommitObjectProxy(model).add_commit(LoraCommit(state, mode="side")) as beside:
        with torch.inference_mode():
            expected = beside[0](x)
        wanted = x.clone().requires_grad_()
        found = beside[0](input=wanted)
        assert torch.equal(found.detach(), expected)
        found.sum().backward()
    assert wanted.grad is not None


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"0.lora_A.weight": torch.ones(4, WIDTH)},
        {"0.something": torch.ones(1)},
        {**lora(1), "0.lora_magnitude_vector": torch.ones(WIDTH)},
    ],
)
def test_a_state_that_is_no_lora_is_refused_when_the_commit_is_made(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(sire.SireError):
        LoraCommit(state)
