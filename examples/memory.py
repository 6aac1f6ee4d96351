"""Layers that are on the device while they are used: sire.memory, in the five topics of its guide (docs/memory.md).

python examples/memory.py [basic|configuration|manual|transformer|sentiment]...

Without a topic it runs all of them. Works with and without a device; models are small.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch
from sire.memory import MemoryConfig, MemoryManager, auto_manage_model
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(condition: bool, claim: str) -> None:
    """Stops the example, with the claim that did not hold."""
    if not condition:
        sys.exit(f"FAILED: {claim}")
    print(f"ok: {claim}")


def layers(count: int = 8, width: int = 512) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(count) for layer in (nn.Linear(width, width), nn.ReLU())])


def basic() -> None:
    """Automatic management: one call, and the model is used as ever."""
    model, x = layers(), torch.randn(4, 512)
    expected = model(x)
    manager = auto_manage_model(model)
    model = model.to(DEVICE)
    check(model[0].weight.device.type == "cpu", "wrapped layers stay away from the device until they are called")
    output = model(x.to(DEVICE))
    check(torch.allclose(output.cpu(), expected, atol=1e-5), "the output is the plain model's")
    manager.cleanup()
    check(type(model[0]) is nn.Linear, "cleanup leaves a plain model")


def configuration() -> None:
    """Presets, and settings of one's own."""
    for config in (
        MemoryConfig.for_low_memory(),
        MemoryConfig.for_high_performance(),
        MemoryConfig(gpu_offload_threshold=0.85, cpu_offload_threshold=0.90, max_disk_usage_gb=50.0),
    ):
        with MemoryManager(config) as manager:
            model = manager.wrap_model(layers()).to(DEVICE)
            model(torch.randn(4, 512, device=DEVICE))
            summary = manager.get_memory_summary()
        print(f"reload below {config.gpu_reload_threshold:.0%}: {summary['system']['total_reloads']} layers were brought")
    try:
        MemoryConfig(gpu_offload_threshold=0.99, gpu_emergency_threshold=0.95)
    except ValueError as error:
        check("gpu_offload_threshold" in str(error), f"what makes no sense is refused: {error}")


def manual() -> None:
    """One layer, moved by hand."""
    with MemoryManager() as manager:
        layer = manager.wrap_module(nn.Linear(1024, 512), module_id="my_layer")
        layer.load_all()
        check(layer.weight.device.type == DEVICE.type, "load_all brings it")
        layer.offload_all()
        check(layer.weight.device.type == "cpu", "offload_all sends it away")
        print(f"my_layer: {layer.get_memory_info()['offloaded_parameters']} parameters are offloaded")


def transformer() -> None:
    """A transformer, trained while its layers come and go."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True), 4, enable_nested_tensor=False)
    twin, x = copy.deepcopy(model), torch.randn(2, 16, 128)
    with MemoryManager(MemoryConfig(aggressive_post_forward_offload=True)) as manager:
        manager.wrap_model(model)
        model.to(DEVICE)
        losses = [_step(model, x.to(DEVICE)) for _ in range(2)]
        moved = manager.get_memory_summary()["system"]["bytes_copied"]
    expected = [_step(twin, x) for _ in range(2)]
    close = all(abs(one - other) < 1e-4 for one, other in zip(losses, expected, strict=True))
    check(close, f"losses {losses} are the plain model's ({moved / 2**20:.0f} MiB moved)")


def _step(model: nn.Module, x: torch.Tensor) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


class Sentiment(nn.Module):
    """A small classifier of texts that are numbers already."""

    def __init__(self, words: int = 2000, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(words)).mean(1)).softmax(-1)


def sentiment(requests: int = 60, goal_ms: float = 100.0) -> None:
    """Single requests, and how long they take."""
    model = Sentiment().eval()
    manager = auto_manage_model(model, MemoryConfig.for_high_performance())
    model.to(DEVICE)
    taken = []
    with torch.no_grad():
        for number in range(requests + 5):
            words = torch.randint(0, 2000, (1, 32), device=DEVICE)
            began = time.perf_counter()
            scores = model(words).cpu()
            if number >= 5:  # the first ones bring the layers
                taken.append((time.perf_counter() - began) * 1e3)
    summary = manager.get_memory_summary()
    manager.cleanup()
    check(bool(torch.isclose(scores.sum(), torch.tensor(1.0), atol=1e-5)), "scores are probabilities")
    centiles = statistics.quantiles(taken, n=100)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "the CPU"
    print(f"on {where}: p50 {centiles[49]:.1f} ms, p99 {centiles[98]:.1f} ms; the goal is {goal_ms:.0f} ms")
    print(f"monitoring took {summary['system']['monitor_overhead']:.2%} of the time")


TOPICS = {each.__name__: each for each in (basic, configuration, manual, transformer, sentiment)}


def main() -> None:
    wanted = sys.argv[1:] or list(TOPICS)
    if not set(wanted) <= set(TOPICS):
        sys.exit(f"usage: python {sys.argv[0]} [{'|'.join(TOPICS)}]...")
    for topic in wanted:
        print(f"== {topic}: {TOPICS[topic].__doc__}")
        TOPICS[topic]()


main()
