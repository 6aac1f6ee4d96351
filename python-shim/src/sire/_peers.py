"""Devices that copy to and from each other's memory: memory of regions looks like `cudaMalloc`'s, which it is not.

For its own copies between devices PyTorch enables peer access by CUDA's call, which does not reach memory of regions.
So access is given here, between devices that have a context. Where that call is hooked the library follows it, too, but
others do not make it where they are heard: NCCL between GPUs of one process reads and writes tensors of all of them.
Where two devices have no way to each other, PyTorch's copy relies on what the driver does for `cudaMalloc`'s memory
alone: that cannot be mended here, and is said.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

from . import _library

_introduced: set[int] = set()
_lock = threading.Lock()


def introduce(torch: Any, device: int) -> None:
    """Lets a device, in whose memory a region is to be, and the others in use reach each other's regions. Once each.

    What cannot be done is a warning: regions are what they are without it.
    """
    count = int(torch.cuda.device_count())
    if count < 2 or len(_introduced) == count:
        return
    in_use = [each for each in range(count) if each == device or torch._C._cuda_hasPrimaryContext(each)]
    if _introduced.issuperset(in_use):
        return
    said: list[str] = []
    with _lock:
        for new in in_use:
            if new not in _introduced:
                for known in sorted(_introduced):
                    said += [*_obstacle(torch, known, new), *_obstacle(torch, new, known)]
                _introduced.add(new)
    # After all of it: where warnings are errors, the next region begins.
    for each in said:
        warnings.warn(each, RuntimeWarning, stacklevel=4)


def _obstacle(torch: Any, owner: int, accessor: int) -> list[str]:
    """Why one device does not reach the other's regions from now on; nothing if it does."""
    try:
        if torch.cuda.can_device_access_peer(accessor, owner):
            _library.load().allow_peer(owner, accessor)
            return []
        why = "no peer access"
    except RuntimeError as error:
        why = str(error)
    return [
        f"cuda:{accessor} cannot reach memory of cuda:{owner} ({why}): copies of tensors in regions between these "
        "devices fail or are wrong. Copy through the host: tensor.cpu().to(device)."
    ]
