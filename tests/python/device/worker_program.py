"""A process with tensors in regions that does what it is told, one line at a time; settings come from its environment.

``worker_program.py '[{"tag": ..., "backup": ..., "mib": ..., "seed": ..., "small": ...}, ...]'``
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import sire
import torch

MIB = 1 << 20


def content(mib: int, seed: int, small: bool) -> torch.Tensor:
    """Random bytes; with ``small``, bfloat16 numbers of which all have few digits."""
    chance = torch.Generator().manual_seed(seed)
    if small:
        return torch.randint(0, 4, (mib * MIB // 2,), generator=chance, dtype=torch.int16).to(torch.bfloat16)
    return torch.randint(-(1 << 62), 1 << 62, (mib * MIB // 8,), generator=chance, dtype=torch.int64)


def main() -> None:
    tensors: list[tuple[torch.Tensor, tuple[int, int, bool]]] = []
    for spec in json.loads(sys.argv[1]):
        what = (spec["mib"], spec["seed"], spec.get("small", False))
        with sire.region(spec["tag"], backup=spec["backup"], immutable=spec.get("immutable", False)):
            tensors.append((content(*what).to("cuda"), what))
    torch.cuda.synchronize()

    def exact() -> bool:
        return all(torch.equal(tensor.cpu(), content(*what)) for tensor, what in tensors)

    def answer(verb: str, *words: str) -> Any:
        match verb:
            case "pause" | "resume":
                return dataclasses.asdict(getattr(sire, verb)(*words))
            case "promote":
                return sire.promote(*words)
            case "stats":
                return sire.stats()
            case "exact":
                return exact()
        raise ValueError(verb)

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(*line.split())), flush=True)


main()
