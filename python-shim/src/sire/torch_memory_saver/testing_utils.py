"""Helpers that tests written for that package import."""

from __future__ import annotations

from typing import Any


def get_device() -> str:
    """The device type of tests."""
    return "cuda"


def empty_cache() -> None:
    """Empties PyTorch's cache."""
    _cuda().empty_cache()


def get_and_print_gpu_memory(message: str, gpu_id: int = 0) -> int:
    """The device's used bytes, also printed."""
    free, total = _cuda().mem_get_info(gpu_id)
    used = int(total - free)
    print(f"GPU {gpu_id} memory: {used / 1024**3:.2f} GB ({message})")
    return used


def _cuda() -> Any:
    import torch

    return torch.cuda
