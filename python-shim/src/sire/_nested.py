"""Tensors in lists, tuples, tables and whatever else PyTorch knows as a container, moved to a device.

Containers keep their types; named tuples are made of what is in them one by one. A packed sequence moves by itself,
because some of its tensors stay in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def to_device(value: Any, device: Any, moves: Callable[[Any], bool] | None = None) -> Any:
    """The same with everything in it on a device that ``moves`` says has a ``to``; by default these are tensors."""
    import torch

    has_to = moves or _is_tensor

    def moved(each: Any) -> Any:
        return each.to(device) if has_to(each) else each

    return torch.utils._pytree.tree_map(moved, value, is_leaf=has_to)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, (torch.Tensor, torch.nn.utils.rnn.PackedSequence))
