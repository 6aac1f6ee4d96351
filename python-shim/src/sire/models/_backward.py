"""Backward passes of modules that were offloaded after their forward: they are loaded for it, and offloaded at its end.

While a module is in use with gradients enabled, its outputs are given a hook that autograd calls before it goes back
through them. A flip of a parameter's data keeps its version and its place in the graph, so that what autograd has saved
is still right once the module is back at its addresses.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from .._errors import SireError
from .._passes import at_end

if TYPE_CHECKING:
    from ._users import ResourcePoolUserABC


def come_back_for_backward(users: list[ResourcePoolUserABC[Any]]) -> list[Any]:
    """Handles of hooks on the users' modules, which are to be removed at the end of the use."""
    import torch

    if not torch.is_grad_enabled():
        return []
    handles: list[Any] = []
    for user in users:
        module = user.manage_object
        if isinstance(module, torch.nn.Module) and user.get_runtime_device().type != "cpu":
            handles.append(module.register_forward_hook(_Watch(_watching(weakref.ref(user)))))
    return handles


class _Watch:
    """The hook of a module in use: its outputs are watched. A copy of the module has one that does nothing."""

    def __init__(self, watching: Callable[[Any], None] | None = None) -> None:
        self._watching = watching

    def __call__(self, _module: Any, _args: Any, output: Any) -> None:
        if self._watching is not None:
            self._watching(output)

    def __reduce__(self) -> Any:
        return _Watch, ()


def _watching(user: weakref.ref[ResourcePoolUserABC[Any]]) -> Callable[[Any], None]:
    """A function: PyTorch's compiler takes a weak reference that is an object's attribute for what it refers to."""
    return lambda output: watch(output, user)


def watch(output: Any, user: weakref.ref[ResourcePoolUserABC[Any]]) -> None:
    """Before autograd goes back through these outputs, the user is loaded."""
    seen: set[int] = set()
    for tensor in _tensors(output):
        node = tensor.grad_fn
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            node.register_prehook(_Return(user))


class _Return:
    """Loads a user when backward reaches it, until that backward is over."""

    def __init__(self, user: weakref.ref[ResourcePoolUserABC[Any]]) -> None:
        self._user = user

    def __call__(self, _gradients: Any) -> None:
        from ._manage import acquire

        user = self._user()
        if user is None:
            return
        holder = threading.get_ident()
        acquire([user])
        at_end(lambda failed: _end(user, holder, failed))


class Held:
    """A use that goes on until backward is over, or until nobody can ask for a backward any more."""

    def __init__(self, user: ResourcePoolUserABC[Any]) -> None:
        self._user: ResourcePoolUserABC[Any] | None = user
        self._holder = threading.get_ident()

    @classmethod
    def until_backward(cls, output: Any, user: ResourcePoolUserABC[Any]) -> bool:
        """Takes over a use of the calling thread's, if the output can be asked for a backward; whether it did."""
        nodes = {id(tensor.grad_fn): tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None}
        if not nodes or user.get_runtime_device().type == "cpu":
            return False
        held = cls(user)
        for node in nodes.values():
            node.register_prehook(held)
        return True

    def __call__(self, _gradients: Any) -> None:
        user, self._user = self._user, None
        if user is not None:
            at_end(lambda failed: _end(user, self._holder, failed))

    def __del__(self) -> None:
        user, self._user = self._user, None
        if user is not None:
            _end(user, self._holder, collected=True)


def _end(user: ResourcePoolUserABC[Any], holder: int, collected: bool) -> None:
    """Ends a use. ``collected``: by whoever cleans up, which may be anywhere, and cannot be told of a failure."""
    from ._manage import release

    with suppress(SireError) if collected else nullcontext():
        release([user], holder=holder, collected=collected)


def _tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in _tensors(each)]
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return []
