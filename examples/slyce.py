"""A model in slices that take turns on the device: sire.slyce, and how long each strategy takes.

python examples/slyce.py [none|active_only|limit_gpu]...

Works with and without a device. SIRE_EXAMPLE_BYTES does not count here: the model has 4 slices of 8 MiB.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from sire.slyce import SlyceModel
from sire.slyce.models import EncoderDecoder
from torch import nn

WIDTH = 1024
SLICES = 4


def check(condition: bool, claim: str) -> None:
    """Stops the example, with the claim that did not hold."""
    if not condition:
        sys.exit(f"FAILED: {claim}")
    print(f"ok: {claim}")


def block(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def sliced(strategy: Any, directory: str) -> SlyceModel:
    return SlyceModel(
        slices=[{"name": f"block{i}", "constructor": block, "config": i} for i in range(SLICES)],
        gpu_strategy=strategy,
        max_gpu_mem_mb=20 if strategy == "limit_gpu" else None,
        disk_cache_path=directory,
        log_to_console=False,
    )


def strategy(name: str) -> None:
    """Runs the slices as a pipeline, and times it."""
    x = torch.randn(1, WIDTH)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        expected = nn.Sequential(*[block(i) for i in range(SLICES)])(x)
        model = sliced(name, directory)
        model.run_pipeline(x)
        began = time.perf_counter()
        result = model.run_pipeline(x)
        seconds = time.perf_counter() - began
        check(torch.allclose(result.cpu(), expected, atol=1e-5), f"{name}: the output is the plain model's")
        print(model.summary())
        print(f"{name}: {seconds * 1e3:.1f} ms for one pass over {SLICES} slices\n")
        model.close()


def state() -> None:
    """A trained slice keeps what it learned, on the disk and in a file."""
    with tempfile.TemporaryDirectory() as directory:
        model = sliced("active_only", directory)
        optimizer = torch.optim.SGD(model.slice("block0").parameters(), lr=0.5)
        model(torch.randn(1, WIDTH), active_slice="block0").sum().backward()
        optimizer.step()
        learned = model.slice("block0").state_dict()["0.weight"].cpu().clone()
        model.offload_slice("block0")
        if model.summary().slices[0].tier == "cpu":
            model.offload_slice("block0")
        check(model.summary().disk_bytes > 0, "a slice that nobody uses can be on the disk")
        model.save_state_dict(f"{directory}/state.pt")
        model.close()
        again = sliced("none", directory)
        again.load_state_dict(f"{directory}/state.pt")
        check(torch.equal(again.slice("block0").state_dict()["0.weight"], learned), "what it learned was kept")
        again.close()


def ready_made() -> None:
    """An encoder and a decoder as two slices."""
    model = EncoderDecoder(64, 4, encoder_layers=2, decoder_layers=2, layer_options={"batch_first": True}, log_to_console=False)
    output = model(torch.randn(1, 6, 64), torch.randn(1, 3, 64))
    check(output.shape == (1, 3, 64), "an encoder-decoder decodes")


def main() -> None:
    wanted = sys.argv[1:] or ["none", "active_only", "limit_gpu"]
    if not set(wanted) <= {"none", "active_only", "limit_gpu"}:
        sys.exit(f"usage: python {sys.argv[0]} [none|active_only|limit_gpu]...")
    for name in wanted:
        strategy(name)
    state()
    ready_made()


main()
