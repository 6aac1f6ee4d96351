"""Outputs that lie in the memory of the module that made them, such as a part of one of its buffers: they get memory of
their own before the module leaves the device.
"""

from __future__ import annotations

from typing import Any

from .._nested import tensors_in
from ._users import ResourcePoolUserABC, user_adopted


def outlasting(output: Any, user: ResourcePoolUserABC[Any]) -> Any:
    """The output, with copies of what lies in the memory of the user's module or of one that it shares tensors with."""
    import torch

    adopted = user_adopted(user)
    if adopted is None or adopted.device.type == "cpu":
        return output
    holders = (adopted, *adopted.shares)

    def inside(value: Any) -> list[Any]:
        return [each for each in tensors_in(value) if any(holder.holds(each) for holder in holders)]

    copies = {id(each): each.clone() for each in inside(output)}
    if not copies:
        return output
    found = torch.utils._pytree.tree_map(lambda each: copies.get(id(each), each), output)
    for each in inside(found):
        # In an object that nobody can make anew. What is the module's own goes where the module goes.
        if all(each is not tensor for holder in holders for tensor in holder.tensors):
            each.data = copies[id(each)].detach()
    return found
