"""Tensors in lists, tuples, tables and whatever else PyTorch knows as a container, moved to a device.

Containers keep their types; named tuples are made of what is in them one by one. A packed sequence moves by itself,
because some of its tensors stay in host memory.
"""

from __future__ import annotations

from typing import Any


def to_device(value: Any, device: Any) -> Any:
    """The same with every tensor in it on a device."""
    import torch

    def moved(each: Any) -> Any:
        return each.to(device) if _is_tensor(each) else each

    return torch.utils._pytree.tree_map(moved, value, is_leaf=_is_tensor)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, (torch.Tensor, torch.nn.utils.rnn.PackedSequence))
