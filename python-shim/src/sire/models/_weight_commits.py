"""Commits that write weights, and commits that hang functions into a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from .._errors import InvalidArgumentError
from ._commits import CommitABC, Revert, named_tensors, required
from ._undo import Undo, at_hand, in_place

Change = Any
"""What happens to a weight: a tensor that is added to it, or a function that is given it and returns the new one."""
HookKind = Literal["forward", "forward_pre", "backward", "backward_pre"]


class WeightCommit(CommitABC[Any]):
    """Changes weights by name: ``{name: delta}`` adds, ``{name: function}`` replaces by what the function returns.

    Deltas are added in fp32 (fp64 for weights of fp64), times ``scale``, and rounded once. Reverting restores the bits
    that were there. All or nothing: names and shapes are checked before anything is written.
    """

    def __init__(self, changes: Mapping[str, Change], scale: float = 1.0) -> None:
        if not isinstance(changes, Mapping) or not changes:
            raise InvalidArgumentError("a WeightCommit takes a table {name: tensor or function} that is not empty")
        self._changes = dict(changes)
        self.scale = float(scale)

    def apply(self, obj: Any, **kwargs: Any) -> Revert:
        """Writes the weights."""
        named = named_tensors(obj)
        pairs = [(name, required(named, name, obj), change) for name, change in self._changes.items()]
        for name, tensor, change in pairs:
            if not callable(change) and change.shape != tensor.shape:
                raise InvalidArgumentError(
                    f"the delta for {name!r} has shape {list(change.shape)}, the weight has {list(tensor.shape)}"
                )
        return written(pairs, self._new)

    def _new(self, name: str, tensor: Any, change: Change) -> Any:
        if not callable(change):
            return added(tensor, change, self.scale)
        new = change(tensor.detach().clone())
        if getattr(new, "shape", None) != tensor.shape:
            raise InvalidArgumentError(f"the function for {name!r} must return a tensor of shape {list(tensor.shape)}")
        return new


def written(pairs: list[tuple[str, Any, Any]], new: Callable[[str, Any, Any], Any]) -> Revert:
    """Writes ``new(name, tensor, change)`` into each tensor, or nothing; returns what restores them."""
    import torch

    undo = Undo()
    try:
        with torch.no_grad():
            for name, tensor, change in pairs:
                with at_hand(tensor):
                    undo.save(tensor)
                    value = new(name, tensor, change)
                    with in_place(tensor):
                        tensor.copy_(value)
    except BaseException as error:
        undo.restore_after(error)
        raise
    return lambda _: undo.restore()


def added(tensor: Any, delta: Any, scale: float) -> Any:
    """The sum in fp32 or more, rounded once."""
    import torch

    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if tensor.is_complex():
        wide = torch.promote_types(tensor.dtype, torch.complex64)
    summed = tensor.detach().to(wide) + delta.detach().to(device=tensor.device, dtype=wide) * scale
    return summed.to(tensor.dtype)


class HookCommit(CommitABC[Any]):
    """Hangs functions into a module and its submodules: ``{submodule name: function}``; ``""`` is the module itself.

    ``kind`` says which of PyTorch's hooks they are: ``"forward"`` (module, args, output), ``"forward_pre"`` (module,
    args), ``"backward"`` or ``"backward_pre"``. Reverting removes them.
    """

    def __init__(
        self, hooks: Mapping[str, Callable[..., Any]] | Callable[..., Any], kind: HookKind = "forward"
    ) -> None:
        self._hooks = {"": hooks} if callable(hooks) else dict(hooks)
        if kind not in _REGISTER:
            raise InvalidArgumentError(f"kind is one of {', '.join(_REGISTER)}, not {kind!r}")
        self._kind = kind

    def apply(self, obj: Any, **kwargs: Any) -> Revert:
        """Registers the functions."""
        modules = dict(obj.named_modules())
        unknown = [name for name in self._hooks if name not in modules]
        if unknown:
            raise InvalidArgumentError(f"{type(obj).__name__} has no submodule {unknown[0]!r}")
        return hooked([(modules[name], hook) for name, hook in self._hooks.items()], self._kind)


def hooked(pairs: list[tuple[Any, Callable[..., Any]]], kind: HookKind, **options: Any) -> Revert:
    """Hangs each function into its module, or none; returns what removes them. Options are PyTorch's."""
    handles: list[Any] = []

    def revert(_: Any) -> None:
        for handle in handles:
            handle.remove()

    try:
        for module, hook in pairs:
            handles.append(getattr(module, _REGISTER[kind])(hook, **options))
    except BaseException:
        revert(None)
        raise
    return revert


_REGISTER = {
    "forward": "register_forward_hook",
    "forward_pre": "register_forward_pre_hook",
    "backward": "register_full_backward_hook",
    "backward_pre": "register_full_backward_pre_hook",
}
