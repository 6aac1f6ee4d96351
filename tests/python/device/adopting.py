"""What tests of adopted modules share: a module with something of everything in it, and what it is compared by."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from sire._adopt import Adopted


class Net(torch.nn.Module):
    """Tied weights, a view, a buffer that is persistent and one that is not."""

    def __init__(self, seed: int = 0, width: int = 256) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = torch.nn.Linear(width, width)
        self.two = torch.nn.Linear(width, width)
        self.tied = torch.nn.Linear(width, width)
        self.tied.weight = self.one.weight
        self.norm = torch.nn.BatchNorm1d(width)
        self.register_buffer("scale", torch.rand(width), persistent=False)
        self.register_buffer("part", self.norm.running_mean[: width // 2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.two(torch.tanh(self.one(x))))
        return self.tied(x) * self.scale


def twin(seed: int = 0, **more: Any) -> Net:
    """The same module, which nobody adopts."""
    return Net(seed, **more)


def released() -> Iterator[list[Adopted]]:
    """What a test has adopted: released at the end, whatever happened."""
    made: list[Adopted] = []
    yield made
    for each in made:
        each.release()
    gc.collect()


def used() -> int:
    """The device's used bytes, as the driver counts them."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in the module, on the CPU."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: each.detach().cpu().clone() for name, each in tensors}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    for name, each in one.items():
        assert torch.equal(each, other[name]), name
