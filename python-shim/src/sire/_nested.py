"""Tensors in lists, tuples, tables and whatever else PyTorch knows as a container: moved to a device, or only found,
then also in objects of the program's.

Containers keep their types; named tuples are made of what is in them one by one. A packed sequence moves by itself,
because some of its tensors stay in host memory.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

# Objects that are looked into: what a module returns may hang together with much else.
_MOST_LOOKED_INTO = 10_000
# What has attributes, but is nothing that a module returns its tensors in.
_OTHERS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def to_device(value: Any, device: Any) -> Any:
    """The same with every tensor in it on a device."""
    import torch

    def moved(each: Any) -> Any:
        return each.to(device) if _is_tensor(each) else each

    return torch.utils._pytree.tree_map(moved, value, is_leaf=_is_tensor)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, (torch.Tensor, torch.nn.utils.rnn.PackedSequence))


def tensors_in(value: Any) -> list[Any]:
    """The tensors in a value, also those in attributes of objects (dataclasses, outputs of transformers), each once.
    Not those of modules: they are not what was computed.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    found: list[Any] = []
    seen: set[int] = set()
    waiting = deque([value])
    while waiting and len(seen) < _MOST_LOOKED_INTO:
        each = waiting.popleft()
        if each is None or isinstance(each, (bool, int, float, str, bytes)) or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif not isinstance(each, (torch.nn.Module, *_OTHERS)):
            waiting.extend(_parts(torch, each))
    return found


def _parts(torch: Any, value: Any) -> Iterator[Any]:
    """What is in a container, or hangs in an object."""
    if isinstance(value, dict):
        yield from list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from list(value)
    elif type(value) in torch.utils._pytree.SUPPORTED_NODES:
        yield from torch.utils._pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]
    yield from list(getattr(value, "__dict__", {}).values())
    for name in chain.from_iterable(_slots(kind) for kind in type(value).__mro__):
        yield getattr(value, name, None)


def _slots(kind: type) -> list[str]:
    """The names of attributes that objects of a class have beside ``__dict__``."""
    named = vars(kind).get("__slots__", ())
    names = [named] if isinstance(named, str) else list(named)
    return [name for name in names if isinstance(vars(kind).get(name), types.MemberDescriptorType)]
