"""Modules that come to their device by themselves when they are called, by PyTorch's own hooks."""

from __future__ import annotations

import functools
import threading
import weakref
from contextlib import suppress
from typing import Any

from .._errors import SireError
from .._nested import to_device
from . import _under_way
from ._backward import Held, watch
from ._context import sire_inference_context_manager
from ._estimate import LearnedEstimator, Peak
from ._manage import AutoManageWrapper, acquire, manage, release
from ._outputs import outlasting

_hooks_of: weakref.WeakKeyDictionary[Any, AutoManageHook] = weakref.WeakKeyDictionary()
_making = threading.RLock()


class _Call(_under_way.Call):
    """A call of a module that is under way."""

    def __init__(self, hook: AutoManageHook, args: tuple[Any, ...], kwargs: dict[str, Any], by_hand: bool) -> None:
        super().__init__(hook, by_hand, lasts=by_hand and hook.is_paired)
        self.peak: Peak | None = None
        self.args, self.kwargs = args, kwargs
        self._user, self._holder = hook.am.user, threading.get_ident()

    def end_use(self) -> None:
        """What fails here stays loaded, and makes way when somebody needs room."""
        with suppress(SireError):
            release([self._user], holder=self._holder, collected=True)


class AutoManageHook:
    """Loads a module before its forward and offloads it afterwards, also if forward raises. Arguments are moved to its
    device.

    A module in training mode stays loaded until the backward of what it returned is over, or its outputs are dropped;
    any other is offloaded at once, and comes back for a backward.
    """

    no_grad = False
    """For accelerate and diffusers, which look at hooks like this one."""

    is_paired = True
    """Whether who calls `pre_forward` calls `post_forward`, too. If not, the use is over when the next one begins."""

    def __init__(self, am: AutoManageWrapper | _Weak | _Nobody) -> None:
        self.am = am
        self._handles: list[Any] = []

    @classmethod
    def manage_module(cls, module: Any, **kwargs: Any) -> AutoManageHook:
        """Makes the module manage itself; keywords are those of `sire.manage`. Again: the same hook."""
        _compiler()
        with _making:
            hook = _hooks_of.get(module)
            if hook is None:
                hook = cls(_Weak(manage(module, **kwargs)))
                hook._attach(module)
                _hooks_of[module] = hook
            return hook

    def _attach(self, module: Any) -> None:
        _keep_compiler_out()
        # First before everybody else's hooks, and last after them.
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def execution_device(self) -> Any:
        """The device on which the module runs."""
        return self.am.get_execution_device()

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What happens before a forward; returns its arguments, on the device."""
        moved: tuple[tuple[Any, ...], dict[str, Any]] | None = self._before(module, args, kwargs, by_hand=True)
        return (args, kwargs) if moved is None else moved

    def post_forward(self, module: Any, output: Any) -> Any:
        """What happens after a forward."""
        changed = self._after(module, (), output, by_hand=True)
        return output if changed is None else changed

    def remove(self) -> None:
        """The module does not manage itself any more; `sire.manage` still does."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        with _making:
            module = self.am.get_manage_object()
            if module is not None and _hooks_of.get(module) is self:
                del _hooks_of[module]

    def __reduce__(self) -> Any:
        """A copy of the module (``copy.deepcopy``, ``torch.save``) does not manage itself."""
        return AutoManageHook, (_Nobody(),)

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], by_hand: bool = False) -> Any:
        if isinstance(self.am, _Nobody):
            return None
        call = _Call(self, args, kwargs, by_hand)
        # Before anything can fail: PyTorch calls the other hook after any Exception.
        _under_way.begin(call)
        try:
            return self._enter(call, args, kwargs)
        except BaseException as error:
            if by_hand or not isinstance(error, Exception):
                _under_way.end(self, by_hand)
                call.abandon()
            raise

    def _enter(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with sire_inference_context_manager(*args, **kwargs):
            acquire([self.am.user])
        call.entered = True
        device = self.execution_device
        if isinstance(getattr(self.am.user, "inference_memory_estimator", None), LearnedEstimator):
            call.peak = Peak(device).__enter__()
        return to_device(args, device), to_device(kwargs, device)

    def _after(self, module: Any, _args: Any, output: Any, by_hand: bool = False) -> Any:
        """The output, which must not lie in the module's memory any more; None of a call that did not begin."""
        call = _under_way.end(self, by_hand)
        if not isinstance(call, _Call) or not call.entered:
            return None
        call.entered = False
        user = self.am.user
        if call.peak is not None:
            call.peak.__exit__()
            user.inference_memory_estimator.observe(call.args, call.kwargs, call.peak.bytes)  # type: ignore[union-attr]
        try:
            output = outlasting(output, user)
        except BaseException:
            release([user])
            raise
        # Also a backward after the first one (retain_graph) finds the user loaded.
        watch(output, user)
        if not (module.training and Held.until_backward(output, user)):
            release([user])
        return output

    # --- what accelerate and diffusers ask of the hook of a module -------------------------------------------------

    def init_hook(self, module: Any) -> Any:
        """Nothing."""
        return module

    def detach_hook(self, module: Any) -> Any:
        """Nothing: `remove` does it."""
        return module


class _Nobody:
    """The wrapper of a copy's hook, which does nothing."""

    user: Any = None

    def get_execution_device(self) -> Any:
        """Wherever the copy is."""
        import torch

        return torch.device("cpu")

    def get_manage_object(self) -> None:
        """No object is managed."""


@functools.cache
def _compiler() -> Any | None:
    """PyTorch's compiler. Its import takes long: not under a lock. Where it cannot be imported, nothing is compiled."""
    import torch

    try:
        import torch._dynamo
    except Exception:
        return None
    return torch.compiler


@functools.cache
def _keep_compiler_out() -> None:
    """The compiler would trace into hooks, and give up at the first lock, with warnings, or fail (2.11)."""
    compiler = _compiler()
    if compiler is None:
        return
    for each in (AutoManageHook._before, AutoManageHook._after):
        setattr(AutoManageHook, each.__name__, compiler.disable(each))


class _Weak:
    """A wrapper that does not keep its object: the object keeps the hook."""

    def __init__(self, wrapper: AutoManageWrapper) -> None:
        self.user = wrapper.user
        self._reference = weakref.ref(wrapper.get_manage_object())

    def get_execution_device(self) -> Any:
        """Where the object runs."""
        return self.user.get_runtime_device()

    def get_manage_object(self) -> Any | None:
        """The object, while anybody uses it."""
        return self._reference()
