"""Host memory that a managed model takes beside what the process had before: one measurement, printed as JSON.

    overhead.py WAY MIB

WAY is `memory` (a model that the program has made) or `source` (a model without content, and a safetensors file that has it). Anonymous
memory of the process is counted after each load and each offload, and the most of it is what counts: pages of a file are the page cache's.
Every load is followed by a comparison of all weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import sire
import torch
from torch import nn

MIB = 1 << 20
LAYER = 4 * MIB
ROUNDS = 3


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


PATTERN = torch.arange(LAYER // 4, dtype=torch.float32).remainder_(251)
FOUND, WANTED = torch.empty_like(PATTERN), torch.empty_like(PATTERN)


def layer(number: int, into: torch.Tensor) -> torch.Tensor:
    """The content of a layer; nothing else is made for it, because what this program leaves behind would count."""
    return into.copy_(PATTERN).add_(number)


def model(count: int, device: str = "cpu") -> nn.Module:
    made = nn.Module()
    for number in range(count):
        content = torch.empty(LAYER // 4, device=device)
        content = layer(number, content) if device == "cpu" else content
        made.register_parameter(f"w{number}", nn.Parameter(content, requires_grad=False))
    return made


def checkpoint(count: int, folder: str) -> str:
    """A safetensors file, written layer by layer."""
    header = {f"w{n}": {"dtype": "F32", "shape": [LAYER // 4], "data_offsets": [n * LAYER, (n + 1) * LAYER]} for n in range(count)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = Path(folder) / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number in range(count):
            file.write(layer(number, WANTED).numpy().data)
    return str(path)


def managed(way: str, count: int, folder: str) -> Any:
    if way == "memory":
        return sire.manage(model(count))
    return sire.manage(model(count, "meta"), source=checkpoint(count, folder))


def used(wrapper: Any) -> tuple[int, int]:
    """The most anonymous memory over some uses, and how many layers were wrong."""
    most, wrong = anonymous(), 0
    for _ in range(ROUNDS):
        with sire.auto_manage(wrapper):
            for number, each in enumerate(wrapper.get_manage_object().parameters()):
                wrong += not torch.equal(FOUND.copy_(each), layer(number, WANTED))
            most = max(most, anonymous())
        most = max(most, anonymous())
    return most, wrong


def main() -> None:
    way, mib = sys.argv[1], int(sys.argv[2])
    sire.setup_default_pools()
    with tempfile.TemporaryDirectory(prefix="sire-bench-") as folder:
        # What the first use of everything takes does not count; and a program that has freed large memory once gets the next from its heap.
        torch.ones(28 * MIB // 4)
        used(managed(way, 8, folder))
        before = anonymous()
        wrapper = managed(way, mib * MIB // LAYER, folder)
        most, wrong = used(wrapper)
    print(json.dumps({"ratio": (most - before) / (mib * MIB), "wrong": wrong}))


main()
