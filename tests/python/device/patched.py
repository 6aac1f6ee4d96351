"""A small model for commits, what tells its weights to the bit, and LoRAs for it."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 16


def small(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).to(dtype)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].cpu().view(torch.uint8), value.view(torch.uint8)) for name, value in expected.items()
    )


def lora(seed: int, names: tuple[str, ...] = ("0", "2"), rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in names:
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, WIDTH, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(WIDTH, rank, generator=generator)
    return state
