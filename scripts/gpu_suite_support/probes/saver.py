"""Pause and resume through torch_memory_saver's interface, by Sire or by that package itself. Imports PyTorch.

The same program for both, so that their figures stand beside each other; `--package` picks which. Every byte of a
tensor with a backup is compared after every resume.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

MIB = 1 << 20
BLOCK = 16 * MIB


def blocks(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors cut into blocks."""
    return [block for tensor in tensors for block in tensor.view(-1, BLOCK)]


def write(tensors: list[torch.Tensor], pattern: torch.Tensor) -> None:
    """Fills every block with the pattern, and its number in front."""
    for number, block in enumerate(blocks(tensors)):
        block.copy_(pattern)
        block[0] = number % 251
    torch.cuda.synchronize()


def wrong(tensors: list[torch.Tensor], pattern: torch.Tensor) -> list[int]:
    """Numbers of the blocks that hold something else."""
    return [number for number, block in enumerate(blocks(tensors)) if int(block[0]) != number % 251 or not torch.equal(block[1:], pattern[1:])]


def plain_copy(size: int) -> dict[str, float]:
    """Best of five, GB/s, of plain pinned copies of `size` bytes in blocks."""
    block = min(size, 256 * MIB)
    host = torch.empty(block, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(block, dtype=torch.uint8, device="cuda")
    best = {"pause": 0.0, "resume": 0.0}
    for _ in range(6):
        for verb, target, source in (("pause", host, device), ("resume", device, host)):
            start = time.perf_counter()
            for _ in range(size // block):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            best[verb] = max(best[verb], size // block * block / (time.perf_counter() - start) / 1e9)
    return best


def main() -> int:
    """Measures one package with one backup."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", choices=("sire", "torch_memory_saver"), required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--backup", choices=("none", "cpu", "disk"), required=True)
    parser.add_argument("--retain", action="store_true", help="only for the names; the environment says it to the package")
    parser.add_argument("--cycles", type=int, default=4)
    options = parser.parse_args()
    if options.package == "sire":
        from sire.torch_memory_saver import torch_memory_saver as saver
    else:
        from torch_memory_saver import torch_memory_saver as saver
    saver.hook_mode = "torch"

    ceiling = plain_copy(options.bytes)
    torch.cuda.empty_cache()
    pattern = torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, device="cuda")
    kept = {f"enable_{options.backup}_backup": True} if options.backup != "none" else {}
    with saver.region(tag="suite", **kept):
        tensors = [torch.empty(options.bytes // 4, dtype=torch.uint8, device="cuda") for _ in range(4)]
    write(tensors, pattern)
    addresses = [tensor.data_ptr() for tensor in tensors]
    seconds: dict[str, list[float]] = {"pause": [], "resume": []}
    bad: list[int] = []
    given_back: list[int] = []
    for _ in range(options.cycles):
        before = torch.cuda.mem_get_info()[0]
        for verb in ("pause", "resume"):
            torch.cuda.synchronize()
            start = time.perf_counter()
            getattr(saver, verb)("suite")
            seconds[verb].append(time.perf_counter() - start)
            if verb == "pause":
                given_back.append(torch.cuda.mem_get_info()[0] - before)
        if options.backup != "none":
            bad += wrong(tensors, pattern)
    moved = addresses != [tensor.data_ptr() for tensor in tensors]
    figures = figures_of(options, seconds, ceiling)
    print(json.dumps({"figures": figures, "wrong": bad, "moved": moved, "given_back": given_back}), flush=True)
    return 0


def figures_of(options: argparse.Namespace, seconds: dict[str, list[float]], ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """The figures: the first cycle is cold."""
    found = []
    backup = options.backup + ("+retain" if options.retain else "")
    for verb, times in seconds.items():
        for phase, some in (("cold", times[:1]), ("warm", times[1:])):
            middle = statistics.median(some)
            figure = {"name": f"saver.{options.package}.{verb}.{backup}.{phase}", "samples": len(some)}
            figure |= {"seconds": middle, "bytes": options.bytes}
            if options.backup == "none":
                figure |= {"value": middle * 1000, "unit": "ms"}
            else:
                figure |= {"value": options.bytes / middle / 1e9, "unit": "GB/s"}
            if options.backup == "cpu":
                # The disk's is that of the step `kit`.
                figure["ceiling"] = ceiling[verb]
            found.append(figure)
    return found


if __name__ == "__main__":
    sys.exit(main())
