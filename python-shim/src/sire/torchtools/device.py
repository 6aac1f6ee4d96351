"""Which device: by the environment, or by what is free."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from .. import _library
from .._errors import InvalidArgumentError, SireError
from . import _nvml


def get_device_from_env() -> Any:
    """The `torch.device` for this process: the GPU of its ``LOCAL_RANK`` (made current), else the current GPU, else
    Apple's (MPS), else the CPU.

    RuntimeError if ``LOCAL_RANK`` names a GPU that this process does not see.
    """
    import torch

    if torch.cuda.is_available():
        index = local_rank()
        if index is None:
            return torch.device("cuda", torch.cuda.current_device())
        count = int(torch.cuda.device_count())
        if index >= count:
            raise InvalidArgumentError(
                f"LOCAL_RANK is {index}, but this process sees {count} GPUs (CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); start fewer processes, or make more GPUs visible"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def local_rank() -> int | None:
    """``LOCAL_RANK``; None if it is not set."""
    text = os.environ.get("LOCAL_RANK", "").strip()
    if not text:
        return None
    if not text.isdigit():
        raise InvalidArgumentError(f"LOCAL_RANK is {text!r}; it must be a number, 0 or more")
    return int(text)


def gpu_index(torch: Any, gpu: object) -> int:
    """The ordinal of ``gpu``: an int, ``"cuda:1"``, a `torch.device`, or None for that of ``LOCAL_RANK``, else the
    current one.
    """
    if gpu is None:
        gpu = local_rank()
    if gpu is None:
        return int(torch.cuda.current_device())
    try:
        device = torch.device("cuda", gpu) if isinstance(gpu, int) else torch.device(gpu)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"{gpu!r} is not a GPU: {error}") from error
    index = int(torch.cuda.current_device()) if device.index is None else int(device.index)
    count = int(torch.cuda.device_count())
    if device.type != "cuda" or index >= count:
        raise InvalidArgumentError(f"{gpu!r} is not a GPU of this process, which sees {count}")
    return index


def available(torch: Any, index: int) -> int:
    """Bytes of a GPU that a reservation could have now: what is free, less what is reserved and not owned yet."""
    memory = _nvml.memory(uuid(torch, index))
    free: int = memory.free if memory is not None else int(torch.cuda.mem_get_info(index)[0])
    try:
        entries = _library.load().reservations(index)["entries"]
    except SireError:
        return free
    promised: int = sum(max(0, each["bytes"] - each["owned"]) for each in entries if each["state"] == "holding")
    return max(0, free - promised)


def uuid(torch: Any, index: int) -> str:
    """A GPU's UUID, the same whatever ordinal it has in a process."""
    return str(torch.cuda.get_device_properties(index).uuid)


def select_device(min_free_bytes: int = 0, *, candidates: Iterable[object] | None = None) -> Any:
    """The `torch.device` with the most memory that nobody uses or has reserved; among those that have about as much
    (a sixteenth), the one with the least load. ``candidates``: the GPUs to choose from, else all that this process
    sees. Without CUDA, as `get_device_from_env`.

    Choosing reserves nothing: two processes may choose the same. `SireError` if no GPU has ``min_free_bytes``.
    """
    import torch

    if not torch.cuda.is_available():
        return get_device_from_env()
    chosen = range(torch.cuda.device_count()) if candidates is None else [gpu_index(torch, gpu) for gpu in candidates]
    room = {index: available(torch, index) for index in chosen}
    fitting = {index: free for index, free in room.items() if free >= min_free_bytes}
    if not fitting:
        raise SireError(
            f"no GPU has {min_free_bytes} bytes that nobody uses or has reserved: "
            + (", ".join(f"cuda:{index} has {free}" for index, free in room.items()) or "there are no candidates")
        )
    enough = max(fitting.values()) * 15 // 16
    best = [index for index, free in fitting.items() if free >= enough]
    return torch.device("cuda", min(best, key=lambda index: (_nvml.load(uuid(torch, index)), -fitting[index], index)))
