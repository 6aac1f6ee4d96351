"""Backward passes and optimizers over units that come and go.

A forward pass saves weights for the backward pass. Here it saves *which* weight: the tensor is asked for when the
backward pass gets there, which brings the unit, so that between the passes the unit can leave. What is no unit's is
saved as ever. Gradients travel with their parameters.

An optimizer steps where its parameters are. Before a step, a unit goes to host memory, its gradients and optimizer
state with it, unless all of that is on the device and the device has room for what the step makes beside it. It stays
where it is until the step is over.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from .._owners import in_memory
from .holding import reach
from .residency import Residency
from .unit import Unit


class _Weight(NamedTuple):
    """A saved tensor that is part of a unit's: which, which of its bytes, and how they are read."""

    residency: Residency
    unit: Unit
    of: Any
    offset: int
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugated: bool
    negated: bool
    version: int

    def tensor(self) -> Any:
        """It, where the unit's tensor is now."""
        import torch

        tensor = self.of.detach()
        empty = torch.empty(0, dtype=self.dtype, device=tensor.device)
        offset = (tensor.storage_offset() * tensor.element_size() + self.offset) // empty.element_size()
        made = empty.set_(tensor.untyped_storage(), offset, self.shape, self.strides)
        made = made.conj() if self.conjugated else made
        return torch._neg_view(made) if self.negated else made


class _Theirs(NamedTuple):
    """A saved tensor that is no part of a unit's, as the hooks around have packed it, and what unpacks it."""

    packed: Any
    unpack: Callable[[Any], Any]


def _named(saved: Any, tensor: Any, offset: int, unit: Unit, residency: Residency) -> _Weight:
    shape, strides = tuple(saved.shape), tuple(saved.stride())
    lazy = saved.is_conj(), saved.is_neg()
    return _Weight(residency, unit, tensor, offset, saved.dtype, shape, strides, *lazy, tensor._version)


@contextmanager
def forward_of(unit: Unit, residency: Residency) -> Iterator[None]:
    """Inside runs a module's forward, with gradients; weights that it saves for its backward pass are saved by name.

    PyTorch asks the innermost hooks alone. What else is saved goes to those around: of another unit, of
    `torch.utils.checkpoint`, of ``save_on_cpu``.
    """
    import torch

    if not unit.tensors or not _may_save_by_name():
        yield
        return
    spans = [(each.data_ptr(), each.data_ptr() + reach(each), each) for each in unit.tensors]
    where, around = unit.here, _hooks_around()

    def pack(saved: Any) -> Any:
        if saved.layout == torch.strided and saved.device == where:
            at = saved.data_ptr()
            for start, end, tensor in spans:
                # What is read in larger elements might not begin at a multiple of them any more, once it was moved.
                if start <= at < end and saved.element_size() <= tensor.element_size():
                    return _named(saved, tensor, at - start, unit, residency)
        return (saved, saved._version) if around is None else _Theirs(around[0](saved), around[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _hooks_around() -> tuple[Callable[[Any], Any], Callable[[Any], Any]] | None:
    """The pair that packs and unpacks what is saved now; None where PyTorch saves it as it is."""
    import torch

    if torch.compiler.is_compiling():
        return None
    # Private to PyTorch: without it, hooks around are passed by, as PyTorch itself does.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None if top is None else top(False)
    return hooks


def _unpack(packed: Any) -> Any:
    if isinstance(packed, _Theirs):
        return packed.unpack(packed.packed)
    if not isinstance(packed, _Weight):
        tensor, version = packed
        _refuse_changed(tensor, version)
        return tensor
    packed.residency.hold_for_backward(packed.unit)
    _refuse_changed(packed.of, packed.version)
    return packed.tensor()


def _refuse_changed(tensor: Any, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {list(tensor.shape)} is at version {tensor._version}; expected {version} instead"
        )


def _may_save_by_name() -> bool:
    """Whether PyTorch takes hooks for what is saved: not inside of ``torch.func.grad`` and its like."""
    import torch

    # torch.compile, which breaks its graph here in any case, warns of what it cannot look into.
    return torch.compiler.is_compiling() or bool(torch._C._autograd._saved_tensors_hooks_is_enabled())


class _Graph:
    """A unit that has it stays: backward passes, which have it too, read its tensors themselves."""


def keep_for_graph(output: Any, units: Iterable[Unit]) -> None:
    """Where weights cannot be saved by name, the units stay for as long as a backward pass through these outputs can
    be made.
    """
    if _may_save_by_name():
        return
    graph = _Graph()
    for unit in units:
        unit.graphs.add(graph)
    for each in _with_what_they_wrap(output):
        if each.grad_fn is not None:
            each.grad_fn.metadata.setdefault(_Graph, []).append(graph)


def _with_what_they_wrap(output: Any) -> Iterator[Any]:
    """Tensors of an output, and those in them of the transforms around."""
    import torch

    found = [each for each in torch.utils._pytree.tree_leaves(output) if isinstance(each, torch.Tensor)]
    while found:
        yield from found
        functorch = torch._C._functorch
        found = [functorch.get_unwrapped(each) for each in found if functorch.is_functorch_wrapped_tensor(each)]


def expect_backward(output: Any, unit: Unit, residency: Residency) -> None:
    """The backward pass through these outputs will need the unit, gradients included."""
    import torch

    if not torch.is_grad_enabled() or not _may_save_by_name():
        return

    def needed(_: Any) -> None:
        residency.hold_for_backward(unit)

    for each in torch.utils._pytree.tree_leaves(output):
        if isinstance(each, torch.Tensor) and each.requires_grad and each.grad_fn is not None:
            each.register_hook(needed)


# --- gradients and optimizers ---------------------------------------------------------------------------------

_owners: Any = None
_owners_lock = threading.Lock()
# For each thread, the units that an optimizer of it works on.
_stepping = threading.local()


def watch(unit: Unit, residency: Residency) -> list[Any]:
    """Optimizers and backward passes find the unit of its parameters from now on; returns handles with ``remove``."""
    handles = []
    for each in unit.tensors:
        if each.is_leaf and each.requires_grad:
            handles.append(each.register_post_accumulate_grad_hook(_beside_its_parameter))
        with _owners_lock:
            _known_owners()[each] = (weakref.ref(unit), weakref.ref(residency))
    return handles


def forget(unit: Unit) -> None:
    """Optimizers do not find the unit any more."""
    with _owners_lock:
        for each in unit.tensors:
            _known_owners().pop(each, None)


def owner(tensor: Any) -> tuple[Unit, Residency] | None:
    """The unit of a tensor, and who looks after it."""
    with _owners_lock:
        found = _known_owners().get(tensor)
    if found is None:
        return None
    unit, residency = found[0](), found[1]()
    return None if unit is None or residency is None else (unit, residency)


def _known_owners() -> Any:
    global _owners
    if _owners is None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
        from torch.utils.weak import WeakIdKeyDictionary

        _owners = WeakIdKeyDictionary()
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        in_memory.append(_promoted)
    return _owners


@contextmanager
def _promoted(tensors: Iterable[Any]) -> Iterator[None]:
    """No unit of these tensors is on the disk inside."""
    units = {id(found[0]): found[0] for each in tensors if (found := owner(each)) is not None}
    with ExitStack() as stack:
        for _, unit in sorted(units.items()):
            stack.enter_context(unit.lock)
            unit.promote()
        yield


def _beside_its_parameter(parameter: Any) -> None:
    gradient = parameter.grad
    if gradient is not None and gradient.device != parameter.device:
        gradient.data = gradient.data.to(parameter.device)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    _after_step(optimizer)  # a step that ended with an exception
    units: dict[int, tuple[Unit, Residency]] = {}
    fused: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = owner(parameter)
            if found is not None:
                units[id(found[0])] = found
                fused.update([id(parameter)] if group.get("fused") else [])
    _stepping.units = []
    taken = 0
    for unit, residency in units.values():
        with unit.lock:
            taken += _settle(unit, residency, list(_state_of(unit, optimizer, fused)), taken)
            unit.frozen, unit.ends = True, None
        _stepping.units.append(unit)


def _after_step(optimizer: Any, *_: Any) -> None:
    for unit in getattr(_stepping, "units", []):
        unit.frozen = False
    _stepping.units = []


def _state_of(unit: Unit, optimizer: Any, fused: set[int]) -> Iterator[Any]:
    """What an optimizer keeps for a unit's tensors, to be where they are. Steps are counted in host memory, but where
    one kernel does everything: for parameters that are ``fused``, by identity.
    """
    for each in unit.tensors:
        for value in optimizer.state.get(each, {}).values():
            if hasattr(value, "data_ptr") and (value.dim() or value.device.type != "cpu" or id(each) in fused):
                yield value


def _settle(unit: Unit, residency: Residency, tensors: list[Any], taken: int) -> int:
    """Parameters, gradients and optimizer state in one place; returns what the step will take on the device for them,
    where steps of other units take ``taken`` bytes."""
    if unit.arriving:
        unit.load()
    if unit.tier == "gpu" and all(each.device == unit.here for each in tensors):
        # Some of what is computed, and the first time as much state as most optimizers have.
        cost = unit.nbytes * (2 if tensors else 5)
        if unit.leases or unit.pinned or residency.spare(unit.here) - taken >= cost:
            return cost
    unit.frozen = False
    residency.spared_by_backward(unit)  # a pass that steps in a hook has nothing under way with it
    if unit.tier == "gpu" and unit.may_leave and not residency.needed_by_backward(unit):
        residency.offload(unit)
    if unit.tier == "disk":
        unit.promote()
    for each in tensors:
        if each.device != unit.here:
            each.data = each.data.to(unit.here)
    return 0
