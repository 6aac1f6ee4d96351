"""Models larger than the device, and patches: one measurement, printed as JSON.

    layers.py oversized WAY LAYERS MIB PASSES
    layers.py slices SLICES MIB PASSES
    layers.py patches TIMES

`oversized` measures once for each line of standard input: WAY is `sire` (sire.memory) or `accelerate` (cpu_offload, layer by layer), with LAYERS of
MIB each on a device for half of them, or `resident` (nobody moves anything) on a device for all. Every answer is compared with the one that the
model gave on the CPU.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

MIB = 1 << 20


def layer(mib: int, seed: int = 0) -> nn.Module:
    width = math.isqrt(mib * MIB // 4)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh())


def timed(run: Any, x: torch.Tensor, expected: torch.Tensor, passes: int) -> dict[str, Any]:
    """The passes after the first one, which learns the order."""
    wrong = int(not torch.equal(run(x).cpu(), expected))
    began = time.perf_counter()
    for _ in range(passes):
        wrong += int(not torch.equal(run(x).cpu(), expected))
    return {"seconds": (time.perf_counter() - began) / passes, "wrong": wrong}


def oversized(way: str, layers: int, mib: int, passes: int) -> Iterator[dict[str, Any]]:
    """Once for each line of standard input."""
    model = nn.Sequential(*[layer(mib, seed) for seed in range(layers)])
    x = torch.randn(1, next(model.parameters()).shape[1])
    expected = model(x)
    if way == "sire":
        from sire.memory import MemoryManager

        manager = MemoryManager()
        manager.wrap_model(model)
        model.to("cuda")
    elif way == "resident":
        model.to("cuda")
    else:
        from accelerate import cpu_offload  # type: ignore[import-not-found]

        cpu_offload(model, torch.device("cuda", 0))
    for _ in sys.stdin:
        yield timed(lambda value: model(value.cuda()), x, expected, passes)


def slices(count: int, mib: int, passes: int) -> dict[str, Any]:
    """Seconds of each strategy, and how many answers were wrong."""
    from sire.slyce import SlyceModel

    x = torch.randn(1, math.isqrt(mib * MIB // 4))
    value = x
    for i in range(count):
        value = layer(mib, i)(value)
    described = [{"name": f"slice{i}", "constructor": layer, "config": (mib, i)} for i in range(count)]
    result: dict[str, Any] = {"wrong": 0}
    for strategy in ("none", "active_only", "limit_gpu"):
        room = (count // 2) * (mib + 1) if strategy == "limit_gpu" else None
        model = SlyceModel(described, gpu_strategy=strategy, max_gpu_mem_mb=room, log_to_console=False)  # type: ignore[arg-type]
        found = timed(model.run_pipeline, x, value, passes)
        model.close()
        result[strategy] = found["seconds"]
        result["wrong"] += found["wrong"]
    return result


def patches(rebases: int) -> dict[str, Any]:
    from sire.models.commits import CommitObjectProxy, LoraCommit

    model, chooser = layer(1), random.Random(0)
    width = model[0].weight.shape[0]  # type: ignore[index]
    clean = model[0].weight.detach().clone()  # type: ignore[index]
    states = [{"0.lora_A.weight": torch.randn(8, width), "0.lora_B.weight": torch.randn(width, 8)} for _ in range(4)]
    available = [LoraCommit(each) for each in states]
    proxies = [CommitObjectProxy(model)]
    proxies += [proxies[0].clone_and_add_commit(each) for each in available]
    began = time.perf_counter()
    for _ in range(rebases):
        chooser.choice(proxies).apply_commit_stack()
    seconds = time.perf_counter() - began
    proxies[0].apply_commit_stack()
    wrong = int(not torch.equal(model[0].weight, clean))  # type: ignore[index]
    return {"us": seconds / rebases * 1e6, "wrong": wrong, "overhead": monitor(rebases)}


def monitor(looks: int) -> float:
    """CPU time of a look at memory, as a share of the default interval between two."""
    from sire.memory import MemoryMonitor

    torch.cuda.init()
    watching = MemoryMonitor()
    for _ in range(looks):
        watching.look()
    return watching.seconds_spent / looks / watching.config.memory_check_interval


def main() -> None:
    what, arguments = sys.argv[1], sys.argv[2:]
    words, numbers = [each for each in arguments if not each.isdigit()], [int(each) for each in arguments if each.isdigit()]
    with torch.no_grad():
        if what == "oversized":
            for result in oversized(words[0], *numbers):
                print(json.dumps(result), flush=True)
        else:
            print(json.dumps({"slices": slices, "patches": patches}[what](*numbers)))  # type: ignore[operator]


main()
