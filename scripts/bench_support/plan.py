"""The sizes of a run: the real ones, and tiny ones that only show that everything works."""

from __future__ import annotations

from dataclasses import dataclass

from .figures import GIB, MIB


@dataclass(frozen=True)
class Sizes:
    """How much and how often."""

    amount: int = 2 * GIB
    repeats: int = 7
    disk: int = 1 * GIB
    stall_mib: int = 2048
    allocations: int = 1_000_000
    tags: int = 10_000
    depths: tuple[int, ...] = (1, 2, 4, 8)
    clean: int = 1 * GIB
    shared: int = 256 * MIB
    simulated_gib: int = 64
    # Profiles of the model clock; none: all of them.
    profiles: tuple[str, ...] = ()
    calls: int = 20_000
    served: int = 10
    served_mib: int = 32
    requests: int = 60
    rounds: int = 63
    sliced_mib: int = 96
    sliced_steps: int = 12
    sliced_quantum: float = 0.4


SMOKE = Sizes(
    amount=64 * MIB,
    repeats=2,
    disk=32 * MIB,
    stall_mib=64,
    allocations=1000,
    tags=10,
    depths=(1, 2),
    clean=128 * MIB,
    shared=64 * MIB,
    simulated_gib=1,
    profiles=("h100-pcie5-kvcached",),
    calls=1000,
    served=5,
    served_mib=4,
    requests=10,
    rounds=30,
    sliced_mib=64,
    sliced_steps=8,
    sliced_quantum=0.1,
)
