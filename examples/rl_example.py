"""A training loop that shares the device with its own inference engine.

Each round generates with a CUDA graph (weights, cache and the graph's own memory are in regions), pauses all that,
trains where it was, and resumes the engine with the new weights at the same addresses.

    python examples/rl_example.py preload|torch
"""

from __future__ import annotations

from common import check, fitting, hook_mode, show

MODE = hook_mode()

import os  # noqa: E402

import torch  # noqa: E402
from sire.torch_memory_saver import torch_memory_saver  # noqa: E402

ROUNDS = int(os.environ.get("SIRE_EXAMPLE_ROUNDS", "3"))


class Engine:
    """A linear model, a cache that it accumulates into, and a graph of one step."""

    def __init__(self, size: int) -> None:
        self.width = int((size / 4) ** 0.5)
        with torch_memory_saver.region(tag="weights", enable_cpu_backup=True):
            self.weight = torch.eye(self.width, device="cuda")
        with torch_memory_saver.region(tag="cache"):
            self.cache = torch.zeros(self.width, self.width, device="cuda")
        self.input = torch.zeros(8, self.width, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        self.step()
        with torch_memory_saver.cuda_graph(self.graph, tag="graph"):
            self.output = self.step()

    def step(self) -> torch.Tensor:
        hidden = self.input @ self.weight
        self.cache[: hidden.shape[0]].add_(hidden)
        return hidden * 2

    def generate(self, prompt: torch.Tensor) -> torch.Tensor:
        self.cache.zero_()
        self.input.copy_(prompt)
        self.graph.replay()
        return self.output.clone()

    def addresses(self) -> tuple[int, ...]:
        return self.weight.data_ptr(), self.cache.data_ptr(), self.output.data_ptr()


def train(size: int, factor: float) -> float:
    """Something that needs the memory that the engine occupied."""
    parameter = torch.full((size // 4,), factor, device="cuda", requires_grad=True)
    loss = (parameter * parameter).sum() / parameter.numel()
    loss.backward()
    updated = parameter.detach() + parameter.grad * parameter.numel() / 2
    return float(updated[0])


def main() -> None:
    torch_memory_saver.hook_mode = MODE
    size = fitting(400_000_000, share=0.1)
    engine = Engine(size)
    addresses = engine.addresses()
    prompt = torch.ones(8, engine.width, device="cuda")
    scale = 1.0
    for number in range(1, ROUNDS + 1):
        answer = engine.generate(prompt)
        check(bool((answer == 2 * scale).all()), f"round {number}: the graph computes with the current weights")
        resident = show("generated")
        torch_memory_saver.pause()
        check(resident - show("engine paused") >= size, f"round {number}: the engine's memory is free")
        scale = train(size, scale)
        torch.cuda.empty_cache()
        torch_memory_saver.resume("weights")
        engine.weight.mul_(2)
        torch_memory_saver.resume()
        check(engine.addresses() == addresses, f"round {number}: addresses are unchanged")


main()
