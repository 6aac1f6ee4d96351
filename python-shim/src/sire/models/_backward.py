"""Backward passes of modules that were offloaded after their forward: they are loaded for it, and offloaded at its end.

While a module is in use with gradients enabled, what it and the modules in it return is given a hook that autograd
calls before it goes back through that. A flip of a parameter's data keeps its version and its place in the graph, so
that what autograd has saved is still right once the module is back at its addresses.

The modules inside are watched because programs call them one by one (``model.encode(x)``). Hooks on whatever autograd
saves (``saved_tensors_hooks``) would see every use of a parameter, but only one set of them counts at a time, so that
checkpoints and `save_on_cpu` would switch them off, ``torch.func`` refuses them, and each saved tensor costs a call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from .._errors import SireError
from .._nested import tensors_in
from .._passes import at_end, number
from ._collected import get_ready, outside_of_collection

if TYPE_CHECKING:
    from ._users import ResourcePoolUserABC

_changing = threading.RLock()
_watched: weakref.WeakKeyDictionary[ResourcePoolUserABC[Any], _Watched] = weakref.WeakKeyDictionary()


def come_back_for_backward(users: list[ResourcePoolUserABC[Any]]) -> list[_Use]:
    """What the modules of these users return comes back for a backward; to be removed at the end of the use."""
    import torch

    if not torch.is_grad_enabled():
        return []
    modules = [
        user
        for user in users
        if isinstance(user.manage_object, torch.nn.Module) and user.get_runtime_device().type != "cpu"
    ]
    return [_Use(_watched_of(user), user.manage_object) for user in modules]


def come_back_after_load(user: ResourcePoolUserABC[Any]) -> None:
    """As `come_back_for_backward`, of a use that is ended by hand: until `watch_no_longer`, once for each."""
    made = come_back_for_backward([user])
    if made:
        _watched_of(user).by_hand += made


def watch_no_longer(user: ResourcePoolUserABC[Any]) -> None:
    """A use that was ended by hand is over."""
    with suppress(IndexError):
        _watched_of(user).by_hand.pop().remove()


def watch(output: Any, user: ResourcePoolUserABC[Any]) -> None:
    """Before autograd goes back through these outputs, the user is loaded."""
    _watch(output, _watched_of(user).comes_back)


def _watched_of(user: ResourcePoolUserABC[Any]) -> _Watched:
    with _changing:
        found = _watched.get(user)
        if found is None:
            found = _watched[user] = _Watched(user)
        return found


def _watch(output: Any, comes_back: _Return) -> None:
    for node in _nodes(output):
        node.register_prehook(comes_back)


def _nodes(output: Any) -> list[Any]:
    """Where autograd begins to go back through an output."""
    tensors = tensors_in(output)
    return list({id(tensor.grad_fn): tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}.values())


class _Watched:
    """The hooks on the modules of a user, which are there while anybody uses it with gradients enabled."""

    def __init__(self, user: ResourcePoolUserABC[Any]) -> None:
        self.comes_back = _Return(weakref.ref(user))
        self.by_hand: list[_Use] = []
        self._uses = 0
        self._handles: list[Any] = []

    def begin(self, module: Any) -> None:
        """One more use."""
        with _changing:
            self._uses += 1
            if self._uses == 1:
                outer, inside = _Watch(self.comes_back), _WatchInside(self.comes_back)
                wanted = [each for each in module.modules() if _computes(each) and _takes_hooks(each)]
                hooks = [(each, outer if each is module else inside) for each in wanted]
                self._handles = [each.register_forward_hook(hook) for each, hook in hooks]

    def end(self) -> None:
        """One less."""
        with _changing:
            self._uses -= 1
            if not self._uses:
                for handle in self._handles:
                    handle.remove()
                self._handles = []


def _computes(module: Any) -> bool:
    """Whether the module may compute with tensors of its own, or of those in it."""
    return bool(module._parameters or module._buffers or module._modules)


def _takes_hooks(module: Any) -> bool:
    """Not what was scripted."""
    import torch

    return not isinstance(module, torch.jit.ScriptModule)


class _Use:
    """A use with gradients enabled, until it is removed."""

    def __init__(self, watched: _Watched, module: Any) -> None:
        self._watched = watched
        watched.begin(module)

    def remove(self) -> None:
        """The use is over."""
        self._watched.end()


class _Watch:
    """The hook of a module in use: its outputs are watched. A copy of the module has one that does nothing."""

    def __init__(self, comes_back: _Return | None = None) -> None:
        self._comes_back = comes_back

    def __call__(self, _module: Any, _args: Any, output: Any) -> None:
        if self._comes_back is not None:
            _watch(output, self._comes_back)

    def __reduce__(self) -> Any:
        return type(self), ()


class _WatchInside(_Watch):
    """The hook of a module in one that is in use. A compiler sees nothing of it, and breaks no graph for it: of what it
    has compiled, the output of the whole is watched.
    """

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        import torch

        if not torch.compiler.is_compiling():
            super().__call__(module, args, output)


class _Return:
    """Loads a user when a backward pass first reaches what it computed, until that pass is over."""

    def __init__(self, user: weakref.ref[ResourcePoolUserABC[Any]]) -> None:
        self._user = _asked(user)
        self._passes: dict[int, _Pass] = {}

    def __call__(self, _gradients: Any) -> None:
        passing = self._passes.setdefault(number(), _Pass())
        if not passing.has_it:
            # Autograd has a thread for each device: the others wait until it is there.
            with passing.bringing:
                if not passing.has_it:
                    self._bring(number())
                    passing.has_it = True

    def _bring(self, which: int) -> None:
        from ._manage import acquire

        user, holder = self._user(), threading.get_ident()

        def over(failed: bool) -> None:
            self._passes.pop(which, None)
            if user is not None:
                _end(user, holder, failed)

        try:
            if user is not None:
                acquire([user])
        except BaseException:
            self._passes.pop(which, None)
            raise
        at_end(over)


def _asked(user: weakref.ref[ResourcePoolUserABC[Any]]) -> Callable[[], ResourcePoolUserABC[Any] | None]:
    """A function: PyTorch's compiler takes a weak reference that is an object's attribute for what it refers to."""

    def ask() -> ResourcePoolUserABC[Any] | None:
        return user()

    return ask


class _Pass:
    """A backward pass that wants a user."""

    def __init__(self) -> None:
        self.bringing = threading.Lock()
        self.has_it = False


class Held:
    """A use that goes on until backward is over, or until nobody can ask for a backward any more."""

    def __init__(self, user: ResourcePoolUserABC[Any]) -> None:
        self._user: ResourcePoolUserABC[Any] | None = user
        self._holder = threading.get_ident()

    @classmethod
    def until_backward(cls, output: Any, user: ResourcePoolUserABC[Any]) -> bool:
        """Takes over a use of the calling thread's, if the output can be asked for a backward; whether it did."""
        nodes = _nodes(output)
        if not nodes or user.get_runtime_device().type == "cpu":
            return False
        get_ready()
        held = cls(user)
        for node in nodes:
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

    def end() -> None:
        with suppress(SireError) if collected else nullcontext():
            release([user], holder=holder, collected=collected)

    if collected:
        outside_of_collection(end)
    else:
        end()
