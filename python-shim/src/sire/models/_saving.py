"""`state_dict()` of modules of which tensors are in paused mode: while the module is offloaded, these point at memory
that is away, so that copies in host memory take their places.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from .._adopt import Adopted

if TYPE_CHECKING:
    from ._users import TorchModuleWrapper


def make_readable(user: TorchModuleWrapper) -> Any:
    """From now on the user's module has a `state_dict()` that can be read at any time; a handle that ends that."""
    module = user.manage_object
    return None if module is None else module.register_state_dict_post_hook(Readable(weakref.ref(user)))


class Readable:
    """The hook. A copy of the module has one that does nothing."""

    def __init__(self, user: weakref.ref[TorchModuleWrapper] | None = None) -> None:
        self._user = user

    def __reduce__(self) -> Any:
        return Readable, ()

    def __call__(self, _module: Any, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
        import torch

        from ._manage import acquire, release

        user = None if self._user is None else self._user()
        if user is None or user.adopted.loaded:
            return
        # With ``keep_vars`` the parameters themselves are asked for.
        found = {name: each for name, each in state.items() if not isinstance(each, torch.nn.Parameter)}
        away = {name: each for name, each in found.items() if _is_held(user.adopted, each)}
        if not away:
            return
        acquire([user])
        try:
            state.update({name: each.cpu() for name, each in away.items()})
        finally:
            release([user])


def _is_held(adopted: Adopted, value: Any) -> bool:
    """Whether a tensor, or what it wraps, lies in the module's memory."""
    import torch

    if not isinstance(value, torch.Tensor):
        return False
    names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
    return adopted.holds(value) or any(_is_held(adopted, getattr(value, name)) for name in names)
