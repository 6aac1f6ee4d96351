"""One operation for key CUDA, made from its schema: check devices, wait for the stream, run the CPU kernel on aliases, store.

The plan of an operation (which arguments are tensors, which are written, what is returned) is made at its first call. No
closure made per call refers to itself, so no tensor outlives its last user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import capture, composed, devices, halves, memory, random, runtime

_raw_stream = runtime.raw_stream
_synchronize = runtime._synchronize
_alias = memory.alias
_to_device = memory.to_device
_CPU = torch.device("cpu")
_NUMBERS = frozenset({bool, int, float, complex})


def overload(qualified: str) -> Any:
    """The operation of a name such as `aten::add.Tensor`."""
    namespace, _, rest = qualified.partition("::")
    base, _, name = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), name or "default")


class Plan:
    """What an operation's schema says, in the form the kernel uses."""

    __slots__ = (
        "device_argument", "functional", "generator", "keywords", "names", "op", "positions", "qualified",
        "returned", "run", "synchronises", "takes_numbers", "written",
    )  # fmt: skip

    def __init__(self, qualified: str, run: Callable[..., Any] | None) -> None:
        op = overload(qualified)
        arguments = op._schema.arguments
        positional = [a for a in arguments if not a.kwarg_only]
        self.qualified = qualified
        self.op = op
        self.run: Callable[..., Any] = run or op
        self.names = [a.name for a in positional]
        self.positions = [i for i, a in enumerate(positional) if "Tensor" in str(a.type)]
        self.keywords = [a.name for a in arguments if a.kwarg_only and "Tensor" in str(a.type)]
        self.written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        self.generator = qualified in composed.RANDOM or any(a.name == "generator" for a in arguments)
        self.device_argument = any(a.name == "device" for a in arguments)
        self.returned = [_source(result, arguments) for result in op._schema.returns]
        self.functional = not self.written and not self.keywords and not self.generator and not self.device_argument
        self.takes_numbers = bool(torch._C._should_allow_numbers_as_tensors(op.name().split("::")[1].split(".")[0]))
        tags = op.tags
        self.synchronises = torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def _source(result: Any, arguments: Sequence[Any]) -> str | None:
    """The written argument that a return value is, or None for a new one."""
    if result.alias_info is None or not result.alias_info.is_write:
        return None
    for argument in arguments:
        info = argument.alias_info
        if info is not None and info.is_write and info.before_set & result.alias_info.before_set:
            return str(argument.name)
    return None


def kernel(qualified: str, run: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function to register for an operation; `run` replaces the CPU kernel where there is none."""
    plan: Plan | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal plan
        if plan is None:
            plan = Plan(qualified, run)
        if not plan.takes_numbers:
            args = _numbers_as_tensors(plan, args)
        if plan.functional and not kwargs and not capture.active:
            return _functional(plan, args)
        return _general(plan, args, kwargs)

    return call


def _numbers_as_tensors(plan: Plan, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """PyTorch hands a tensor that stands for a Python number over as that number; give it back its tensor.

    The tensor gets the type that the number would lead to beside the other operands, so promotion comes out the same.
    """
    count = len(args)
    if not any(i < count and args[i].__class__ in _NUMBERS for i in plan.positions):
        return args
    others = [args[i] for i in plan.positions if i < count and isinstance(args[i], torch.Tensor)]
    values = list(args)
    for i in plan.positions:
        if i < count and values[i].__class__ in _NUMBERS:
            dtype = torch.result_type(others[0], values[i]) if others else None
            values[i] = torch.tensor(values[i], dtype=dtype)
    return tuple(values)


def _functional(plan: Plan, args: tuple[Any, ...]) -> Any:
    """The short way for an operation that only reads tensors: the greater part of all calls."""
    device = -1
    values = list(args)
    count = len(values)
    for i in plan.positions:
        if i >= count:
            break
        value = values[i]
        if value is None or value.__class__ in _NUMBERS:
            continue
        if not isinstance(value, torch.Tensor) or value.get_device() < 0 or value.layout is not torch.strided:
            return _general(plan, args, {})
        if device < 0:
            device = value.get_device()
        elif device != value.get_device():
            return _general(plan, args, {})
    if device < 0:
        return _general(plan, args, {})
    status = _synchronize(_raw_stream(device))
    if status:
        runtime.fail(status, device)
    for i in plan.positions:
        if i >= count:
            break
        value = values[i]
        if value is not None and value.__class__ not in _NUMBERS:
            values[i] = _alias(value, False)
    result = halves.call(plan.run, values, {})
    if isinstance(result, torch.Tensor):
        return _to_device(result, device)
    return _bring(result, device)


def _bring(result: Any, device: int) -> Any:
    """Results of any shape, their tensors moved to the device."""
    if isinstance(result, torch.Tensor):
        return _to_device(result, device)
    if isinstance(result, tuple):
        return tuple([_bring(item, device) for item in result])
    if isinstance(result, list):
        return [_bring(item, device) for item in result]
    return result


def _operands(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[devices.Operand]:
    found: list[devices.Operand] = []
    for i in plan.positions:
        if i < len(args):
            _add_operands(found, plan, plan.names[i], args[i])
    for name in plan.keywords:
        _add_operands(found, plan, name, kwargs.get(name))
    return found


def _add_operands(found: list[devices.Operand], plan: Plan, name: str, value: Any) -> None:
    # Not a function inside the caller: one that calls itself is a reference cycle, and would hold the tensors.
    if isinstance(value, torch.Tensor):
        found.append((name, value, name in plan.written))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add_operands(found, plan, name, item)


def _device_of(plan: Plan, operands: list[devices.Operand], kwargs: dict[str, Any]) -> int:
    place = -1
    mixed = False
    for _, tensor, _ in operands:
        device = tensor.get_device()
        if place < 0 <= device:
            place = device
        mixed = mixed or tensor.device != operands[0][1].device
    if mixed:
        devices.require_agreement(plan.qualified, operands)
    if place >= 0:
        return place
    wanted = kwargs.get("device")
    if isinstance(wanted, torch.device) and wanted.index is not None:
        return int(wanted.index)
    generator = kwargs.get("generator")
    if isinstance(generator, torch.Generator) and generator.device.type == "cuda":
        return int(generator.device.index)
    return int(torch.cuda.current_device())


class _Lent:
    """The arguments of one call as the CPU kernel gets them, and the pairs (device tensor, alias) of written ones."""

    __slots__ = ("_aliases", "args", "kwargs", "pairs")

    def __init__(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._aliases = memory.Borrow() if plan.written else None
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.args = list(args)
        self.kwargs = dict(kwargs)
        for i in plan.positions:
            if i < len(self.args):
                self.args[i] = self._lend(self.args[i], plan.names[i] in plan.written)
        for name in plan.keywords:
            if name in self.kwargs:
                self.kwargs[name] = self._lend(self.kwargs[name], name in plan.written)
        if plan.device_argument and self.kwargs.get("device") is not None:
            self.kwargs["device"] = _CPU

    def _lend(self, value: Any, write: bool) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.is_cuda:
                return value
            if self._aliases is None:
                return _alias(value, write)
            lent = self._aliases.alias(value, write)
            if write:
                self.pairs.append((value, lent))
            return lent
        if isinstance(value, (list, tuple)):
            return [self._lend(item, write) for item in value]
        return value

    def detach_outputs(self, plan: Plan) -> None:
        """Give the outputs storage of their own, so that the CPU kernel can enlarge them."""
        own = {id(lent): lent.clone(memory_format=torch.preserve_format) for _, lent in self.pairs}
        self.pairs = [(tensor, own[id(lent)]) for tensor, lent in self.pairs]

        def swap(value: Any) -> Any:
            if isinstance(value, list):
                return [swap(item) for item in value]
            return own.get(id(value), value)

        self.args = [swap(value) if plan.names[i] in plan.written else value for i, value in enumerate(self.args)]
        self.kwargs = {name: swap(value) if name in plan.written else value for name, value in self.kwargs.items()}

    def settle(self) -> None:
        """Let device tensors follow outputs that the CPU kernel resized."""
        for tensor, lent in self.pairs:
            if tensor.shape == lent.shape and (tensor.numel() == 0 or tensor.data_ptr() == lent.data_ptr()):
                continue
            if tensor.shape != lent.shape:
                tensor.resize_(lent.shape)
            room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
            if tensor.stride() != lent.stride() and memory.extent(lent) <= room:
                tensor.as_strided_(lent.size(), lent.stride())
            if tensor.stride() != lent.stride():
                _alias(tensor, True).copy_(lent)
            elif tensor.data_ptr() != lent.data_ptr():
                memory.put(tensor, lent, tensor.get_device())


def _general(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The long way: writes, lists, keywords, generators, mixed devices, recording."""
    operands = _operands(plan, args, kwargs)
    device = _device_of(plan, operands, kwargs)
    sparse = next((t for _, t, _ in operands if t.layout is not torch.strided), None)
    if sparse is not None:
        raise NotImplementedError(f"{plan.qualified}: layout {sparse.layout} is not served on the software CUDA device")
    if capture.recording(device):
        from . import recorded

        return recorded.record(plan, args, kwargs, operands, device)
    for place in {tensor.get_device() for _, tensor, _ in operands if tensor.is_cuda} | {device}:
        runtime.wait(place)
    lent = _Lent(plan, args, kwargs)
    generator = random.draw(kwargs.get("generator"), device) if plan.generator else None
    if generator is not None:
        lent.kwargs["generator"] = generator
    try:
        result = halves.call(plan.run, lent.args, lent.kwargs)
    except RuntimeError as error:
        if not lent.pairs or "resize storage that is not resizable" not in str(error):
            raise
        lent.detach_outputs(plan)
        result = halves.call(plan.run, lent.args, lent.kwargs)
    if lent.pairs and plan.keywords:
        lent.settle()
    return deliver(plan, args, kwargs, result, device)


def deliver(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, device: int) -> Any:
    """What the caller gets: written arguments themselves, new tensors brought to the device."""
    returned = plan.returned
    if not returned:
        return None
    if len(returned) == 1:
        name = returned[0]
        return _bring(result, device) if name is None else argument(plan, args, kwargs, name)
    return tuple([
        _bring(item, device) if name is None else argument(plan, args, kwargs, name)
        for item, name in zip(result, returned, strict=True)
    ])  # fmt: skip


def argument(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The argument of that name as the caller gave it."""
    if name in kwargs:
        return kwargs[name]
    return args[plan.names.index(name)]
