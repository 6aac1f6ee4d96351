"""Random numbers: which CPU generator an operation uses, derived from the CUDA generator's own seed and offset.

The state lives in PyTorch's CUDA generator and nowhere else: each random operation takes (seed, offset), advances the
offset, and draws from a CPU generator seeded with a mixture of the two. So `torch.manual_seed`, `torch.cuda.get_rng_state`
and forks of the state behave as on a GPU; the numbers are neither a GPU's nor the CPU's.
"""

from __future__ import annotations

import threading

import torch

STEP = 4  # CUDA generators count in multiples of four
_MASK = (1 << 64) - 1


class _Local(threading.local):
    def __init__(self) -> None:
        self.generator = torch.Generator("cpu")


_local = _Local()
_advance = threading.Lock()


def _mix(seed: int, offset: int) -> int:
    value = (seed + 0x9E3779B97F4A7C15 * (offset + 1)) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return (value ^ (value >> 31)) >> 1


def cpu_generator(seed: int, offset: int) -> torch.Generator:
    """This thread's CPU generator, set to the stream that (seed, offset) names."""
    generator = _local.generator
    generator.manual_seed(_mix(seed, offset))
    return generator


def of_device(generator: torch.Generator | None, device: int) -> torch.Generator:
    """The CUDA generator an operation uses: its argument, or the device's default one."""
    if generator is None:
        return torch.cuda.default_generators[device]
    if generator.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if generator.device.index not in (None, device):
        raise RuntimeError(f"Expected a 'cuda:{device}' generator device but found '{generator.device}'")
    return generator


def take(generator: torch.Generator, steps: int = 1) -> tuple[int, int]:
    """(seed, offset) of the next draw, and advance the generator."""
    with _advance:
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.set_offset(offset + STEP * steps)
    return seed, offset


def draw(generator: torch.Generator | None, device: int) -> torch.Generator:
    """The CPU generator for one operation that runs now."""
    return cpu_generator(*take(of_device(generator, device)))
