"""``module.to(...)``, ``.cuda()``, ``.half()`` and their like on modules that are adopted.

Where an adopted module is, is not up to the module any more: a wish for another device changes nothing. Another dtype
or memory format is made on the host, tensor by tensor, and taken over afterwards, so that the device never holds both.
All of these go through ``torch.nn.Module._apply``, which is replaced when something is adopted for the first time; what
else uses it, and modules that are not adopted, find it as it was.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

from . import _owners
from ._errors import UnsupportedError

if TYPE_CHECKING:
    from ._adopt import Adopted

_PLACEMENTS = frozenset(("to", "cuda", "cpu", "half", "float", "double", "bfloat16", "type", "to_empty"))
_installing = threading.Lock()
_installed = False


def install() -> None:
    """From now on adopted modules are asked for. Once."""
    global _installed
    with _installing:
        if _installed:
            return
        import torch

        original = torch.nn.Module._apply

        @functools.wraps(original)
        def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
            if isinstance(fn, _Request) or not _is_placement(fn):
                return original(self, fn, recurse)
            request = _Request(fn)
            if recurse:
                request.refuse_wrapped(self)
            result = original(self, request, recurse)
            for adopted in request.touched:
                adopted.sync()
            return result

        torch.nn.Module._apply = _apply
        _installed = True


def plain(fn: Any) -> Any:
    """The function by which PyTorch asks, for those who keep it: a request is over when the call is."""
    return fn._fn if isinstance(fn, _Request) else fn


def _is_placement(fn: Any) -> bool:
    """Whether it is one of the functions that PyTorch's own methods pass."""
    names = str(getattr(fn, "__qualname__", "")).split(".")
    return names[0] == "Module" and len(names) > 2 and names[1] in _PLACEMENTS


def _owner_inside(tensor: Any) -> Adopted | None:
    """Who has adopted what a wrapper of tensors wraps; None for any other tensor."""
    # No owner is noted for a wrapper itself: PyTorch swaps wrappers, and refuses to while somebody watches them.
    if not hasattr(tensor, "__tensor_flatten__"):
        return None
    owners = (owner for owner in _owners.everybody() if owner.wraps(tensor))
    return next((owner for owner in owners if owner.device.type != "cpu"), None)


class _Request:
    """What a module is asked for, tensor by tensor."""

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        self._fn = fn
        # Who asks what a function does asks by these names, as `_is_placement` and `_units.wrapping` do.
        self.__module__, self.__qualname__ = fn.__module__, fn.__qualname__
        self._format = inspect.getclosurevars(fn).nonlocals.get("convert_to_format")
        self.touched: list[Adopted] = []

    def refuse_wrapped(self, module: Any) -> None:
        """Before anything is converted: what wraps adopted tensors is not, nor is it read, as those may be away."""
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            owner = _owner_inside(tensor)
            if owner is not None and self._converts(tensor):
                raise UnsupportedError(
                    f"{name} is a {type(tensor).__name__}, which is not converted while {owner.tag!r} is managed: "
                    "convert the module before that"
                )

    def _converts(self, tensor: Any) -> bool:
        import torch

        if self._format is not None and tensor.dim() in (4, 5):
            return True
        return bool(self._fn(torch.empty(0, dtype=tensor.dtype)).dtype != tensor.dtype)

    def __call__(self, tensor: Any) -> Any:
        if _owner_inside(tensor) is not None:
            return tensor
        owner = _owners.of_tensor(tensor)
        if owner is not None and owner not in self.touched and owner.device.type != "cpu":
            # What was taken out of its module is not its any more, once that is looked at.
            owner.sync()
            owner = _owners.of_tensor(tensor)
        if owner is None or owner.device.type == "cpu":
            return self._fn(tensor)
        if owner not in self.touched:
            self.touched.append(owner)
        dtype = self._fn(tensor.new_empty((0,), device="cpu")).dtype
        reordered = self._format is not None and tensor.dim() in (4, 5)
        if dtype == tensor.dtype and not reordered:
            return tensor
        made = tensor.detach().to("cpu", dtype)
        return made.contiguous(memory_format=self._format) if reordered else made
