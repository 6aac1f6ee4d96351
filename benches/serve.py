"""Serves a trace of requests for more models than the device holds, in one of three ways, and prints what it took as JSON.

    serve.py WAY MODELS ROOM MIB REQUESTS SEED

WAY is `sire` (auto_manage), `accelerate` (cpu_offload_with_hook, one model at a time, as it is made for) or `to` (model.to before and
after). ROOM models of MIB each fit. Every answer is compared with the one that the model gave on the CPU.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

MIB = 1 << 20
WIDTH = 512


class Model(torch.nn.Module):
    """Layers of one MiB; the answer depends on every weight."""

    def __init__(self, seed: int, mib: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = torch.nn.ParameterList(torch.randn(MIB // 4 // WIDTH, WIDTH, generator=generator) for _ in range(mib))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(layer @ x).square().mean() for layer in self.layers])


def used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


class Moves:
    """Counts the bytes that `Module.to` moves between devices."""

    def __init__(self) -> None:
        self.bytes = 0
        original = torch.nn.Module.to

        def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
            before = [each.device for each in module.parameters()]
            result = original(module, *args, **kwargs)
            self.bytes += sum(each.nbytes for each, device in zip(module.parameters(), before, strict=True) if each.device != device)
            return result

        torch.nn.Module.to = to  # type: ignore[method-assign]


def with_sire(models: list[Model], room: int, mib: int) -> tuple[Callable[[int, torch.Tensor], torch.Tensor], Callable[[], int]]:
    import sire

    sire.setup_default_pools(vram_limit=room * (mib + 1) * MIB, release="lazy")
    wrappers = [sire.manage(each) for each in models]

    def ask(index: int, x: torch.Tensor) -> torch.Tensor:
        with sire.auto_manage(wrappers[index]) as wrapper:
            return models[index](x.to(wrapper.get_execution_device())).cpu()

    return ask, lambda: sire.summary()["totals"]["bytes_copied"]


def with_accelerate(models: list[Model], room: int, mib: int) -> tuple[Callable[[int, torch.Tensor], torch.Tensor], Callable[[], int]]:
    from accelerate import cpu_offload_with_hook

    moves, there = Moves(), []
    hooked = [cpu_offload_with_hook(each, "cuda") for each in models]

    def ask(index: int, x: torch.Tensor) -> torch.Tensor:
        if there and there[0] != index:
            hooked[there[0]][1].offload()
        there[:] = [index]
        return hooked[index][0](x).cpu()

    return ask, lambda: moves.bytes


def with_to(models: list[Model], room: int, mib: int) -> tuple[Callable[[int, torch.Tensor], torch.Tensor], Callable[[], int]]:
    moves = Moves()

    def ask(index: int, x: torch.Tensor) -> torch.Tensor:
        models[index].to("cuda")
        answer = models[index](x.cuda()).cpu()
        models[index].to("cpu")
        return answer

    return ask, lambda: moves.bytes


def serve(trace: list[int], ask: Callable[[int, torch.Tensor], torch.Tensor], expected: list[torch.Tensor], x: torch.Tensor) -> tuple[float, int, int]:
    """Seconds, wrong answers, and the most device memory that was used."""
    peak, wrong = 0, 0
    began = time.perf_counter()
    for index in trace:
        answer = ask(index, x)
        wrong += not torch.allclose(answer, expected[index], rtol=1e-3)
        peak = max(peak, used())
    return time.perf_counter() - began, wrong, peak


def main() -> None:
    way, (count, room, mib, requests) = sys.argv[1], map(int, sys.argv[2:6])
    torch.zeros(1, device="cuda")
    base = used()
    x = torch.ones(WIDTH)
    with torch.no_grad():
        models = [Model(number, mib).eval() for number in range(count)]
        expected = [model(x) for model in models]
        ask, moved = {"sire": with_sire, "accelerate": with_accelerate, "to": with_to}[way](models, room, mib)
        for index in range(count):  # everything once, so that first times do not count
            ask(index, x)
        for line in sys.stdin:
            trace = random.Random(int(line)).choices(range(count), [1 / (rank + 1) for rank in range(count)], k=requests)
            before = moved()
            seconds, wrong, peak = serve(trace, ask, expected, x)
            served = moved() - before
            loads = served / (mib * MIB) / (1 if way == "sire" else 2)
            told = {"seconds": seconds, "bytes": served, "wrong": wrong, "peak": peak, "base": base}
            print(json.dumps(told | {"hits": 1 - loads / requests, "budget": room * (mib + 1) * MIB}), flush=True)


if __name__ == "__main__":
    main()
