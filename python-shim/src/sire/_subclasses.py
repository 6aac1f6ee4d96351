"""Tensor subclasses that wrap plain tensors, such as quantized weights: what is adopted is the plain tensors inside.

PyTorch's protocol for such wrappers (``__tensor_flatten__``) names the inner tensors, and makes a wrapper around
others. The wrapper knows the device of what is inside, so it is made anew once, when its tensors are on the device for
the first time, and takes the place of the old one; from then on only pages move.
"""

from __future__ import annotations

from ._errors import UnsupportedError
from ._tensors import Found


class Wrapped:
    """A wrapper, and the plain tensors in it."""

    def __init__(self, found: Found) -> None:
        self.tensor = found.tensor
        self._slots = found.slots
        self._names, self._context = found.tensor.__tensor_flatten__()
        self.inner = [getattr(found.tensor, name) for name in self._names]
        self._taken = False
        self._shown = False

    def fresh(self) -> list[Found]:
        """The inner tensors, the first time that they are asked for."""
        if self._taken:
            return []
        self._taken = True
        return [Found(tensor, []) for tensor in self.inner]

    def show(self) -> None:
        """A wrapper that is on the device of its inner tensors hangs where the first one did."""
        if self._shown:
            return
        import torch

        old = self.tensor
        inner = dict(zip(self._names, self.inner, strict=True))
        made = type(old).__tensor_unflatten__(inner, self._context, old.size(), old.stride())
        if isinstance(old, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=old.requires_grad)
        for slot in self._slots:
            slot.put(made)
        self.tensor = made
        self._shown = True


def unwrap(found: list[Found]) -> list[Wrapped]:
    """Wrappers; `UnsupportedError` for a tensor that is neither one nor plain bytes."""
    wrapped = []
    for each in found:
        if not hasattr(each.tensor, "__tensor_flatten__"):
            where = each.slots[0].path if each.slots else "?"
            raise UnsupportedError(
                f"{where} is a {type(each.tensor).__name__} ({each.tensor.layout}) that cannot be taken over: "
                "its memory is not known. Leave its module unmanaged, or make it in a region (sire.region)."
            )
        wrapped.append(Wrapped(each))
    return wrapped
