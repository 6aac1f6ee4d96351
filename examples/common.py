"""What the examples share: the hook mode from the command line, and sizes that fit the device.

    python examples/simple.py torch
    python examples/simple.py preload
    python examples/simple.py driver
    python examples/simple.py allocator

For ``preload`` and ``driver`` the process starts itself again with the library preloaded, which otherwise is done outside:
``LD_PRELOAD=$(sire path) python ...`` or ``sire run -- python ...``.
"""

from __future__ import annotations

import os
import sys

import sire


def hook_mode() -> str:
    """The mode named on the command line; returns only in a process where it is in force."""
    if len(sys.argv) != 2 or sys.argv[1] not in ("preload", "driver", "torch", "allocator"):
        sys.exit(f"usage: python {sys.argv[0]} preload|driver|torch|allocator")
    mode = sys.argv[1]
    if mode in ("preload", "driver") and os.environ.get("SIRE_HOOK_MODE") != mode:
        environment = os.environ | sire.subprocess_environment(hook_mode=mode)
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606
    return mode


def fitting(wanted: int, share: float = 0.25) -> int:
    """``wanted`` bytes, or ``share`` of the device's free memory if that is less. SIRE_EXAMPLE_BYTES sets a limit."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    limit = sire.parse_size(os.environ.get("SIRE_EXAMPLE_BYTES", wanted))
    return min(wanted, limit, int(free * share)) // 4096 * 4096


def used() -> int:
    """The device's used bytes, as the driver counts them, without PyTorch's cache of freed tensors."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def show(moment: str) -> int:
    """Prints and returns the used bytes."""
    amount = used()
    print(f"{moment:<28} {sire.format_size(amount):>12} in use")
    return amount


def check(condition: bool, claim: str) -> None:
    """Stops the example, with the claim that did not hold."""
    if not condition:
        sys.exit(f"FAILED: {claim}")
    print(f"ok: {claim}")
