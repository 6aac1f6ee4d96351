"""Modules that bring their unit when they are called.

`wrap` changes a module in place: it becomes an instance of a class made of `ModuleWrapper` and its own class, so that
the model keeps its structure, `state_dict` its keys, and ``isinstance`` its answers. `unwrap` undoes it. Copies and
pickles of a wrapped module are plain modules.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from .._errors import UnsupportedError
from .._tensors import outside_of_transforms
from . import gradients
from .holding import with_gradients
from .residency import Residency
from .unit import Unit

_KEY = "_sire_wrapped"


@dataclass
class Wrapped:
    """What a wrapped module knows: its unit, who looks after it, and the units of tensors that it shares with
    others.
    """

    unit: Unit
    residency: Residency
    choose: Callable[[Any], bool]
    shared: tuple[tuple[Unit, Residency], ...] = ()
    handles: list[Any] = field(default_factory=list)
    calls: int = 0
    last_call: float | None = None
    listed: list[int] = field(default_factory=list)


class ModuleWrapper:
    """What every wrapped module is besides its own class: a module with a unit. ``isinstance`` finds wrapped
    modules.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with its unit where it is to be used."""
        wrapped = self.__dict__.get(_KEY)
        if wrapped is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        shared = _refresh(self, wrapped)
        with _leased(wrapped, shared):
            # Not before: Dynamo of PyTorch 2.11 and older warns of `time.time`, but follows nobody in here.
            wrapped.calls, wrapped.last_call = wrapped.calls + 1, time.time()
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            for unit, residency in ((wrapped.unit, wrapped.residency), *shared):
                gradients.expect_backward(output, unit, residency)
            gradients.keep_for_graph(output, [wrapped.unit, *(unit for unit, _ in shared)])
            return output

    def offload_all(self) -> None:
        """Everything of this module leaves the device. `sire.BusyError` while it is being used."""
        wrapped = unit_of(self)
        wrapped.residency.offload(wrapped.unit)

    def load_all(self, device: Any = None) -> None:
        """Everything of this module comes to ``device``: by default where it was last sent, else the GPU if there is
        one.
        """
        wrapped = unit_of(self)
        target = wanted_device(wrapped, device)
        if target != wrapped.unit.device:
            self.to(target)  # type: ignore[attr-defined]
        with wrapped.residency.lease(wrapped.unit):
            pass

    def get_memory_info(self) -> dict[str, Any]:
        """Counts of parameters and MiB, loaded and offloaded, and when the module was last called."""
        wrapped = unit_of(self)
        unit, here = wrapped.unit, wrapped.unit.in_use
        elsewhere = [each for each in _tensors_of(self) if all(each is not held for held in unit.tensors)]
        resident = sum(each.numel() * each.element_size() for each in elsewhere)
        held, count = unit.nbytes, sum(each.numel() for each in unit.tensors)
        others = sum(each.numel() for each in elsewhere)
        return {
            "module_id": unit.name,
            "tier": unit.tier,
            "device": str(unit.device),
            "total_parameters": count + others,
            "loaded_parameters": others + (count if here else 0),
            "offloaded_parameters": 0 if here else count,
            "offload_ratio": 0.0 if here or not count else count / (count + others),
            "loaded_memory_mb": (resident + (held if here else 0)) / 2**20,
            "offloaded_memory_mb": (0 if here else held) / 2**20,
            "is_active": unit.leases > 0,
            "forward_count": wrapped.calls,
            "last_forward_time": wrapped.last_call,
        }

    def cleanup(self) -> None:
        """The module is a plain one again, with its weights where they are."""
        if _KEY in self.__dict__:
            unwrap(self)

    # --- what PyTorch does to modules -----------------------------------------------------------------------

    def _apply(self, function: Callable[[Any], Any], recurse: bool = True) -> Any:
        """``.to``, ``.cuda``, ``.half`` and their like. Another device is where the unit is to be used from now on,
        and nothing of it is moved; another dtype is converted in host memory.
        """
        wrapped = self.__dict__.get(_KEY)
        if wrapped is None:
            return super()._apply(function, recurse)  # type: ignore[misc]
        with _locked(_units_within(self)):
            tensors = [each for unit in _units_of(wrapped) for each in unit.tensors]
            held = {id(each): each for each in with_gradients(tensors)}
            dtypes = {each.dtype for each in _tensors_of(self) if id(each) in held}
            device, converted = _converted(wrapped.unit.device, dtypes, function)
            _sent_to(wrapped, device)
            if converted is not None:
                for unit, residency in ((wrapped.unit, wrapped.residency), *wrapped.shared):
                    _to_plain_memory(unit, residency)

            def outside(tensor: Any) -> Any:
                if id(tensor) not in held:
                    return function(tensor)
                return tensor if converted is None else converted(tensor)

            super()._apply(outside, recurse)  # type: ignore[misc]
            return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        wrapped = self.__dict__.get(_KEY)
        if wrapped is not None:
            # What is begun may make others leave, by their leases, while their tensors are in the caller's hands.
            wrapped.residency.settle()
        with _locked(_units_of(wrapped)):  # nobody leaves before its tensors are taken
            bring_to_memory(self)
            super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        wrapped = self.__dict__.get(_KEY)
        units = _units_of(wrapped)
        with _locked(units):  # nobody leaves who is written to: for that, locks are only tried
            bring_to_memory(self)
            try:
                super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
            finally:
                for unit in units:
                    unit.used_otherwise()

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.__dict__.pop(_KEY, None)
        replica.__class__ = original_class(self)
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        kept = _Kept(self)
        with _plain(self) as plain:
            found = plain.__reduce_ex__(protocol)
        if isinstance(found, str):
            return found
        function, arguments, *rest = found
        return (_made, (kept, function, *arguments), *rest)

    def __copy__(self) -> Any:
        kept = _Kept(self)
        with _plain(self) as plain:
            made = copy.copy(plain)
        del kept
        return made

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        kept = _Kept(self)
        known = memo.get((_KEY, id(self)))
        if known is not None:  # something in the module has the module
            return copy.deepcopy(known, memo)
        with _plain(self) as plain:
            memo[_KEY, id(self)] = plain
            made = copy.deepcopy(plain, memo)
        del kept
        return made


# --- wrapping -------------------------------------------------------------------------------------------------


def wrap(module: Any, unit: Unit, residency: Residency, choose: Callable[[Any], bool]) -> None:
    """``module`` brings ``unit`` when it is called; ``choose`` says which of its tensors the unit has."""
    if any(each.__name__ == "ScriptModule" for each in type(module).__mro__):
        raise UnsupportedError(
            f"{type(module).__name__} cannot be wrapped: its class cannot be changed. Wrap the module it was made of"
        )
    wrapped = Wrapped(unit, residency, choose)
    module.__dict__[_KEY] = wrapped
    module.__class__ = _with_wrapper(module)
    residency.add(unit)
    _connect(module, wrapped)


def unwrap(module: Any) -> None:
    """The module is what it was before `wrap`; its tensors are where they are, in host memory if they were on the
    disk.
    """
    wrapped: Wrapped = module.__dict__[_KEY]
    with wrapped.unit.lock:
        wrapped.unit.release()
        _disconnect(wrapped)
        wrapped.residency.remove(wrapped.unit)
        module.__class__ = original_class(module)
        del module.__dict__[_KEY]


def unit_of(module: Any) -> Wrapped:
    """What a wrapped module knows."""
    wrapped: Wrapped | None = module.__dict__.get(_KEY)
    if wrapped is None:
        raise UnsupportedError("this module is not managed any more; wrap it again")
    return wrapped


def is_wrapped(module: Any) -> bool:
    """Whether the module has a unit."""
    return _KEY in module.__dict__


def original_class(module: Any) -> type:
    """The class that the module would have had it not been wrapped."""
    return _without_wrapper(type(module))


@cache
def _wrapped_class(original: type) -> type:
    body = {"__module__": original.__module__, "__doc__": original.__doc__, "_sire_original": original}
    return type(original.__name__, (ModuleWrapper, original), body)


def _with_wrapper(module: Any) -> type:
    """A module's class with the wrapper's in it. What PyTorch made of its class to parametrize it stays above all
    others, where it is looked for: one class for one module, which PyTorch changes and takes away again.
    """
    from torch.nn.utils.parametrize import is_parametrized

    kind: Any = type(module)
    if not is_parametrized(module) or not all(name in vars(kind) for name in module.parametrizations):
        return _wrapped_class(kind)
    body = _body_of(kind)
    body.pop("__deepcopy__", None)  # the wrapper's copies it
    return type(kind.__name__, tuple(_wrapped_class(each) for each in kind.__bases__), body)


def _without_wrapper(kind: type) -> type:
    """A class as it would be, had the wrapper's never been among its bases."""
    if "_sire_original" in vars(kind):
        return cast(type, vars(kind)["_sire_original"])
    if not issubclass(kind, ModuleWrapper):
        return kind
    bases, body = tuple(_without_wrapper(each) for each in kind.__bases__), _body_of(kind)
    if "__getstate__" in body and not any(hasattr(each, "__deepcopy__") for each in bases):
        body.setdefault("__deepcopy__", _deepcopied)
    return type(kind.__name__, bases, body)


def _body_of(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}


def _deepcopied(module: Any, memo: dict[int, Any]) -> Any:
    """As PyTorch copies parametrized modules, which cannot be pickled."""
    memo[id(module)] = made = _unmade(type(module))
    made.__dict__ = copy.deepcopy(module.__dict__, memo)
    return made


def _unmade(kind: type) -> Any:
    """An object of a class, without its ``__init__``."""
    return cast(Any, kind).__new__(kind)


def _made(_: None, function: Callable[..., Any], *arguments: Any) -> Any:
    """What pickles call: the function by which the module's own class makes its objects again."""
    return function(*arguments)


@contextlib.contextmanager
def _plain(module: Any) -> Iterator[Any]:
    """The same as an object of the module's own class, which does with it what it does when it is copied or pickled."""
    import torch

    plain = cast(Any, object.__new__(original_class(module)))
    plain.__dict__.update((name, value) for name, value in module.__dict__.items() if name != _KEY)
    try:
        yield plain
    finally:
        if hasattr(plain, "__del__"):  # the module lives on
            plain.__class__ = torch.nn.Module


class _Kept:
    """Keeps a module's content in memory as long as it lives itself. Who pickles or copies keeps what it was given
    until it is done, and reads the tensors in the meantime; of this object it keeps None.
    """

    def __init__(self, module: Any) -> None:
        wrapped = module.__dict__.get(_KEY)
        with _locked(_units_of(wrapped)) as units:
            bring_to_memory(module)
            for unit in units:
                unit.readers.add(self)

    def __reduce__(self) -> Any:
        return (type(None), ())


@contextlib.contextmanager
def _leased(wrapped: Wrapped, shared: Sequence[tuple[Unit, Residency]]) -> Iterator[None]:
    """The unit, and those of tensors that the module shares, are where they are used; what is saved of them is saved by
    name.
    """
    with contextlib.ExitStack() as stack:
        units = ((wrapped.unit, wrapped.residency), *shared)
        for unit, residency in units:
            with outside_of_transforms():
                residency.acquire(unit)
            stack.callback(residency.release, unit, threading.get_ident())
            if _grad_enabled():
                stack.enter_context(gradients.forward_of(unit, residency))
        try:
            yield
        except BaseException:
            # Other streams may have been given work that the module would have joined.
            for unit, _ in units:
                unit.used_otherwise()
            raise


def _units_of(wrapped: Wrapped | None) -> list[Unit]:
    """All units that have tensors of the module; none of one that is not wrapped any more."""
    return [] if wrapped is None else [wrapped.unit, *(unit for unit, _ in wrapped.shared)]


def _units_within(module: Any) -> list[Unit]:
    """All units that have tensors of the module, or of modules in it; as those say themselves."""
    found = []
    for each in module.modules():
        wrapped = each.__dict__.get(_KEY)
        if wrapped is not None:
            _refresh(each, wrapped)
            found += _units_of(wrapped)
    return found


@contextlib.contextmanager
def _locked(units: Sequence[Unit]) -> Iterator[Sequence[Unit]]:
    """Nobody else moves these units. Whoever needs several has them locked in one order, so that no two threads wait
    for each other.
    """
    with contextlib.ExitStack() as stack:
        for unit in sorted(units, key=id):
            stack.enter_context(unit.lock)
        yield units


def _grad_enabled() -> bool:
    import torch

    return bool(torch.is_grad_enabled())


def own_tensors(module: Any, choose: Callable[[Any], bool]) -> tuple[list[Any], list[tuple[Unit, Residency]]]:
    """The module's tensors that a unit of its own would have; and the units that have others of its tensors."""
    mine, others = [], {}
    for each in _tensors_of(module):
        found = gradients.owner(each)
        if found is not None:
            others[id(found[0])] = found
        elif choose(each):
            mine.append(each)
    return mine, list(others.values())


def _tensors_of(module: Any) -> list[Any]:
    found = {id(each): each for each in module.parameters()}
    found.update((id(each), each) for each in module.buffers())
    return list(found.values())


def _identities(module: Any) -> list[int]:
    """What changes when the module gets other tensors."""
    parts = module.modules() if module._modules else (module,)
    return [id(each) for part in parts for table in (part._parameters, part._buffers) for each in table.values()]


def _connect(module: Any, wrapped: Wrapped) -> None:
    wrapped.shared = _shared(module, wrapped)
    wrapped.handles = gradients.watch(wrapped.unit, wrapped.residency)
    wrapped.listed = _identities(module)


def _shared(module: Any, wrapped: Wrapped) -> tuple[tuple[Unit, Residency], ...]:
    """Other units that have tensors of the module now."""
    _, others = own_tensors(module, lambda _: False)
    return tuple(each for each in others if each[0] is not wrapped.unit)


def _disconnect(wrapped: Wrapped) -> None:
    for handle in wrapped.handles:
        handle.remove()
    gradients.forget(wrapped.unit)


def _refresh(module: Any, wrapped: Wrapped) -> tuple[tuple[Unit, Residency], ...]:
    """If the module has other parameters than before (`load_state_dict(assign=True)`, assignment), so has its unit;
    what it was only lent stays its owner's. Returns the other units that have tensors of the module.
    """
    if wrapped.listed == _identities(module):
        return wrapped.shared
    if _is_lent_some(module):
        return _shared(module, wrapped)
    with wrapped.unit.lock:
        _disconnect(wrapped)
        mine, _ = own_tensors(module, wrapped.choose)
        wrapped.unit.set_tensors(mine)
        _connect(module, wrapped)
        return wrapped.shared


def _is_lent_some(module: Any) -> bool:
    """Whether the module has tensors for the time of a call: some that are no parameters among its parameters, or any,
    buffers too, from `torch.func.functional_call`.
    """
    import torch

    if any(not isinstance(each, torch.nn.Parameter) for each in module.parameters()):
        return True
    lender, frame = torch.nn.utils.stateless._functional_call.__code__, sys._getframe()
    while frame is not None and frame.f_code is not lender:
        frame = cast(Any, frame.f_back)
    return frame is not None


def bring_to_memory(module: Any) -> None:
    """Nothing of the module is on the disk afterwards; what is on the device stays there."""
    wrapped = module.__dict__.get(_KEY)
    if wrapped is not None:
        for unit in _units_of(wrapped):
            with unit.lock:
                unit.promote()
                unit.join()


# --- where and what -------------------------------------------------------------------------------------------


def wanted_device(wrapped: Wrapped, device: Any) -> Any:
    """Where ``load_all`` brings a module."""
    import torch

    if device is not None:
        return concrete(torch.device(device))
    if wrapped.unit.device.type != "cpu":
        return wrapped.unit.device
    return default_device()


def default_device() -> Any:
    """The current CUDA device if there is one, else the CPU."""
    import torch

    return concrete(torch.device("cuda")) if torch.cuda.is_available() else torch.device("cpu")


def concrete(device: Any) -> Any:
    """The device with its number."""
    import torch

    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _sent_to(wrapped: Wrapped, device: Any) -> None:
    """The unit is to be used on this device from now on."""
    unit = wrapped.unit
    if device == unit.device:
        return
    if unit.tier == "gpu":
        if not unit.may_leave:
            unit.refuse_use("sent to another device")
        wrapped.residency.offload(unit)
    if not unit.on_disk:
        unit.release()  # what moves it brings it to the device that it was made for
    unit.device = device


def _to_plain_memory(unit: Unit, residency: Residency) -> None:
    """The unit's tensors are plain ones in host memory, where they can be converted. `BusyError` if it is in use."""
    unit.release()
    if unit.tier == "gpu":
        residency.offload(unit)
        unit.release()


def _converted(
    before: Any, dtypes: Iterable[Any], function: Callable[[Any], Any]
) -> tuple[Any, Callable[[Any], Any] | None]:
    """Where a conversion leads, asked with empty tensors of these dtypes on the device ``before``; and what it does to
    the content, if it does anything.
    """
    import torch

    device, changes = before, False
    for dtype in dtypes:
        probe = torch.empty(0, dtype=dtype, device=before)
        answer = function(probe)
        device = concrete(answer.device)
        same_place = device == before and not (answer is probe and _only_moves(function))
        changes |= answer.dtype != dtype or same_place
    if not changes:
        return device, None

    def convert(tensor: Any) -> Any:
        if _only_moves(function) and device.type != "cpu":
            # In host memory, nothing of it on the device. A tensor that the module has twice is asked about as it is.
            return tensor.to(function(torch.empty(0, dtype=tensor.dtype, device=device)).dtype)
        result = function(tensor)
        return result if result.device == tensor.device else result.to(tensor.device)

    return device, convert


def _only_moves(function: Callable[[Any], Any]) -> bool:
    """Whether a function that returns an empty tensor itself is one of PyTorch's conversions, which do nothing then."""
    return function.__module__ in ("torch.nn.modules.module", __name__) and "share_memory" not in function.__qualname__
