"""The rules on operands of different devices, as PyTorch's CUDA kernels have them; consulted only when devices differ.

`device_checks.txt` names, for operations whose generated wrapper insists on one device, the method named in the error.
All others go through TensorIterator (which admits one 0-dim CPU tensor that is not an output) or have a rule of their own.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

Operand = tuple[str, torch.Tensor, bool]
"""Name of the argument, the tensor, whether it is written."""


@functools.cache
def _strict_methods() -> dict[str, str]:
    text = importlib.resources.files(__package__).joinpath("device_checks.txt").read_text()
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if line and not line.startswith("#")}


def _at_least_two(first: torch.device, second: torch.device) -> NoReturn:
    raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}!")


def _strict(operands: Sequence[Operand], method: str) -> None:
    common = operands[0][1].device
    for name, tensor, _ in operands:
        if tensor.device != common:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but got {name} is on {tensor.device}, different from "
                f"other tensors on {common} (when checking argument in method {method})"
            )


def _iterator(operands: Sequence[Operand]) -> None:
    common = next(tensor.device for _, tensor, _ in operands if tensor.is_cuda)
    scalars = 0
    for _, tensor, written in operands:
        if tensor.device == common:
            continue
        if written or tensor.is_cuda or tensor.dim() != 0:
            _at_least_two(common, tensor.device)
        scalars += 1
        if scalars > 1:
            raise RuntimeError("Trying to pass too many CPU scalars to non-CPU kernel!")


def _indexing(operands: Sequence[Operand]) -> None:
    own = operands[0][1].device
    for name, tensor, _ in operands[1:]:
        if tensor.device == own or (name == "values" and tensor.dim() == 0):
            continue
        if name != "indices":
            _at_least_two(*sorted((own, tensor.device), key=lambda device: device.type != "cuda"))
        if tensor.device.type != "cpu":
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({own})")


def _lists(operands: Sequence[Operand]) -> None:
    """foreach operations work through their lists place by place, so devices need to agree only at the same place."""
    columns: dict[str, list[torch.Tensor]] = {}
    for name, tensor, _ in operands:
        columns.setdefault(name, []).append(tensor)
    length = max(len(column) for column in columns.values())
    for place in range(length):
        row = [
            (name, column[place if len(column) > 1 or length == 1 else 0], False) for name, column in columns.items() if place < len(column) or len(column) == 1
        ]
        if len({tensor.device for _, tensor, _ in row}) > 1:
            _iterator(row)


def _first_decides(operands: Sequence[Operand]) -> None:
    """Lengths and the like are read on the host by these operations; data must be on the device."""
    own = next((tensor.device for _, tensor, _ in operands if tensor.is_cuda))
    for _, tensor, _ in operands:
        if tensor.is_cuda and tensor.device != own:
            _at_least_two(own, tensor.device)


def _fused(operands: Sequence[Operand]) -> None:
    own = operands[0][1].device
    for name, tensor, _ in operands:
        if tensor.device != own and name not in ("lr", "grad_scale", "found_inf"):
            raise RuntimeError(
                "params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout"
                if own.type == "cuda"
                else f"Expected all tensors to be on the same device, but found at least two devices, {tensor.device} and {own}!"
            )


def _convolution(operands: Sequence[Operand]) -> None:
    kind, own = operands[0][1].type(), operands[0][1].device
    for name, tensor, _ in operands[1:]:
        if tensor.device.type != own.type:
            raise RuntimeError(f"Input type ({kind}) and {name} type ({tensor.type()}) should be the same")
        if tensor.device != own:
            _at_least_two(own, tensor.device)


_OWN_RULES: dict[str, Callable[[Sequence[Operand]], None]] = {
    "convolution": _convolution,
    "index": _indexing,
    "_unsafe_index": _indexing,
    "index_put": _indexing,
    "index_put_": _indexing,
    "_index_put_impl_": _indexing,
    "_unsafe_index_put": _indexing,
    "_pack_padded_sequence": _first_decides,
    "_ctc_loss": _first_decides,
    "_ctc_loss_backward": _first_decides,
    "repeat_interleave": _first_decides,
    "segment_reduce": _first_decides,
    "_local_scalar_dense": _first_decides,
    "_efficient_attention_forward": _first_decides,
}


def require_agreement(qualified: str, operands: Sequence[Operand]) -> None:
    """Raise PyTorch's error for operands on different devices, unless the operation admits this mixture."""
    base = qualified.split("::")[1].split(".")[0]
    rule = _OWN_RULES.get(base)
    method = _strict_methods().get(qualified)
    if rule is not None:
        rule(operands)
    elif base.startswith("_foreach_"):
        _lists(operands)
    elif base.startswith("_fused_") and base.endswith("_"):
        _fused(operands)
    elif method is not None:
        _strict(operands, method)
    else:
        _iterator(operands)
