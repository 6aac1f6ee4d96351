"""Operations under stream capture: shapes inferred on the meta device, the work itself added to the graph as a host node.

Nothing is executed while the stream records. A node holds CPU aliases of its operands, results and constants; the graph's
pool keeps the device memory, as for every CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import capture, devices, halves, kernel, memory, random, runtime

_META = torch.device("meta")


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        twin = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=_META)
        return torch._conj(twin) if value.is_conj() else twin
    return _META if isinstance(value, torch.device) else value


def _infer(plan: kernel.Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    meta_args, meta_kwargs = pytree.tree_map(_to_meta, (args, dict(kwargs)))
    meta_kwargs.pop("generator", None)
    try:
        return plan.run(*meta_args, **meta_kwargs), meta_kwargs
    except NotImplementedError as error:
        raise NotImplementedError(f"{plan.qualified} cannot be captured on the software CUDA device: its shapes are not known without running it") from error


def _resize_outputs(plan: kernel.Plan, kwargs: dict[str, Any], metas: dict[str, Any]) -> None:
    for name in plan.keywords:
        out, twin = kwargs.get(name), metas.get(name)
        if isinstance(out, torch.Tensor) and isinstance(twin, torch.Tensor) and out.shape != twin.shape:
            out.resize_(twin.shape)


def _reachable(tensors: list[tuple[torch.Tensor, int]]) -> bool:
    return all(runtime.reachable(t.data_ptr(), memory.extent(t), device, True) for t, device in tensors if t.numel())


def record(plan: kernel.Plan, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[devices.Operand], device: int) -> Any:
    """Add the operation to the graph that the device's current stream records; returns its (yet unwritten) results."""
    if plan.synchronises:
        runtime.refuse_in_capture(device, plan.qualified)
    inferred: Any = None
    if any(name is None for name in plan.returned) or (plan.keywords and plan.written):
        inferred, metas = _infer(plan, args, kwargs)
        _resize_outputs(plan, kwargs, metas)
    results = _outputs(plan, args, kwargs, inferred, device)
    recording = capture.current(device)
    lent = kernel._Lent(plan, args, kwargs)
    draw = recording.drawer(random.of_device(kwargs.get("generator"), device)) if plan.generator else None
    new = [memory.alias(tensor, True) for tensor in _new(plan.returned, results)]
    addresses = {tensor.data_ptr() for _, tensor, _ in operands if tensor.is_cuda}
    leaves = [leaf for leaf in pytree.tree_leaves((lent.args, lent.kwargs)) if isinstance(leaf, torch.Tensor)]
    touched = [(leaf, device) for leaf in leaves if leaf.data_ptr() in addresses] + [(tensor, device) for tensor in new]
    recording.add(runtime.raw_stream(device), _node(plan, lent.args, lent.kwargs, new, draw, touched))
    return results


def _new(returned: list[str | None], result: Any) -> list[torch.Tensor]:
    """The tensors among an operation's results that are not its own arguments."""
    items = result if len(returned) > 1 else (result,)
    fresh = [item for item, name in zip(items, returned, strict=False) if name is None]
    return [leaf for leaf in pytree.tree_leaves(fresh) if isinstance(leaf, torch.Tensor)]


def _outputs(plan: kernel.Plan, args: tuple[Any, ...], kwargs: dict[str, Any], inferred: Any, device: int) -> Any:
    """What the caller gets: written arguments themselves, unwritten device tensors for what is new."""

    def place(value: Any, name: str | None) -> Any:
        if name is not None:
            return kernel.argument(plan, args, kwargs, name)
        return pytree.tree_map_only(torch.Tensor, lambda tensor: memory.allocate_like(tensor, device), value)

    if not plan.returned:
        return None
    if len(plan.returned) == 1:
        return place(inferred, plan.returned[0])
    items = inferred if inferred is not None else plan.returned
    return tuple(place(item, name) for item, name in zip(items, plan.returned, strict=True))


def _node(
    plan: kernel.Plan,
    args: list[Any],
    kwargs: dict[str, Any],
    new: list[torch.Tensor],
    draw: Callable[[], torch.Generator] | None,
    touched: list[tuple[torch.Tensor, int]],
) -> Callable[[], None]:
    """The closure of a host node; it holds CPU aliases only."""

    def replay() -> None:
        if not _reachable(touched):
            return
        values = kwargs if draw is None else {**kwargs, "generator": draw()}
        with torch.no_grad():
            result = halves.call(plan.run, args, values)
            for target, leaf in zip(new, _new(plan.returned, result), strict=True):
                target.copy_(leaf)

    return replay
