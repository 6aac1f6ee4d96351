"""Who has adopted what: modules, tensors and tags, each with at most one owner. Nothing here keeps anybody alive."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ._errors import InvalidArgumentError
from ._tags import encode_tag, is_within

if TYPE_CHECKING:
    from ._adopt import Adopted

lock = threading.RLock()
"""Held while somebody looks for an owner in order to become one."""

in_memory: list[Callable[[list[Any]], AbstractContextManager[object]]] = []
"""Entered around an adoption, with its tensors: whoever has put their content elsewhere brings it, and lets it be."""

_numbers = itertools.count(1)
_by_tag: weakref.WeakValueDictionary[str, Adopted] = weakref.WeakValueDictionary()
_by_module: weakref.WeakKeyDictionary[Any, weakref.ref[Adopted]] = weakref.WeakKeyDictionary()
# By identity, since tensors compare by content.
_by_tensor: Any = None


def of_module(module: Any) -> Adopted | None:
    """How the module is adopted; None if it is not."""
    reference = _by_module.get(module)
    return None if reference is None else reference()


def of_tensor(tensor: Any) -> Adopted | None:
    """Who has adopted the tensor; None if nobody has."""
    reference = None if _by_tensor is None else _by_tensor.get(tensor)
    return None if reference is None else reference()


def everybody() -> list[Adopted]:
    """All that are adopted now."""
    with lock:
        return list(_by_tag.values())


def free_tag(tag: str | None, module: Any) -> str:
    """A tag that no other adopted module has, nor one above or below it."""
    if tag is None:
        return f"models/{type(module).__name__}-{next(_numbers)}"
    encode_tag(tag)
    for other in list(_by_tag):
        if is_within(other, tag) or is_within(tag, other):
            raise InvalidArgumentError(f"the tag {tag!r} cannot be given to a module: {other!r} is another one's")
    return tag


def enter(adopted: Adopted, module: Any) -> None:
    """The module and its tag are this owner's."""
    _by_tag[adopted.tag] = adopted
    _by_module[module] = weakref.ref(adopted)


def claim(adopted: Adopted, tensor: Any) -> None:
    """The tensor is this owner's."""
    global _by_tensor
    if _by_tensor is None:
        from torch.optim.optimizer import register_optimizer_step_post_hook
        from torch.utils.weak import WeakIdKeyDictionary

        _by_tensor = WeakIdKeyDictionary()
        register_optimizer_step_post_hook(_after_step)
    _by_tensor[tensor] = weakref.ref(adopted)


def disown(adopted: Adopted, tensors: list[Any]) -> None:
    """These tensors are not this owner's any more."""
    with lock:
        for tensor in tensors:
            if of_tensor(tensor) is adopted:
                _by_tensor.pop(tensor, None)


def leave(adopted: Adopted, module: Any | None, tensors: list[Any]) -> None:
    """Nothing is this owner's any more."""
    with lock:
        _by_tag.pop(adopted.tag, None)
        if module is not None:
            _by_module.pop(module, None)
        disown(adopted, tensors)


def _after_step(optimizer: Any, _arguments: Any, _keywords: Any) -> None:
    """PyTorch does not count what fused optimizers, and those over lists of tensors, write: they tell themselves."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            owner = of_tensor(tensor)
            if owner is not None:
                owner.changed(tensor)
