"""Runs PyTorch's own operator samples on the device and on the CPU, forward and backward, and says where they differ."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

SAMPLES = 4
_RANDOM = {
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "nn.functional.alpha_dropout",
    "nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d",
    "nn.functional.feature_alpha_dropout", "nn.functional.rrelu", "normal", "rand_like", "randint", "randint_like",
    "randn", "randn_like", "uniform", "svd_lowrank", "pca_lowrank", "nn.functional.fractional_max_pool2d",
    "nn.functional.fractional_max_pool3d", "nn.functional.scaled_dot_product_attention", "normal_", "binomial",
    "nn.functional.multi_head_attention_forward",
}  # fmt: skip
"""Operations that draw numbers: shapes are compared, values are not."""
_UNDEFINED = {
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "linalg.eig", "linalg.eigvals",
}  # fmt: skip
"""Operations whose values are undefined, or defined up to a phase or an order."""


HOST_ONLY = frozenset({
    "as_strided.partial_views",  # its samples are parts of a storage, which the move to the device does not keep
    "tensor_split",  # takes its indices on the host
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "sparse.mm.reduce", "sparse.sampled_addmm", "to_sparse",  # sparse layouts, see test_unsupported.py
    "histogram", "histogramdd",  # PyTorch has no CUDA kernel for them
})  # fmt: skip
"""Operators that the sweep cannot compare in this form."""


def operators() -> list[Any]:
    """PyTorch's table of operators, in its own order."""
    from torch.testing._internal.common_methods_invocations import op_db

    return list(op_db)


def choose(count: int | None, seed: int) -> list[Any]:
    """All operators, or a seeded sample of them."""
    table = operators()
    if count is None:
        return table
    return random.Random(seed).sample(table, min(count, len(table)))


def name_of(info: Any) -> str:
    """The operator's name and its variant."""
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else str(info.name)


def _type_of(info: Any) -> torch.dtype | None:
    supported = info.supported_dtypes("cpu")
    for candidate in (torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool):
        if candidate in supported:
            return candidate
    return None


def to_cuda(value: Any) -> Any:
    """The same arguments on the device, leaves of the gradient graph staying leaves."""

    def move(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            twin = torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device="cuda")
            twin.copy_(item.detach())
            return twin.requires_grad_(item.requires_grad)
        return torch.device("cuda") if isinstance(item, torch.device) or item == "cpu" else item

    return pytree.tree_map(move, value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _compare(ours: Any, expected: Any, values: bool, what: str) -> None:
    mine, reference = _tensors(ours), _tensors(expected)
    if len(mine) != len(reference):
        raise AssertionError(f"{what}: {len(mine)} tensors instead of {len(reference)}")
    for got, want in zip(mine, reference, strict=True):
        if got.device.type != "cuda" and want.layout is torch.strided:
            raise AssertionError(f"{what}: a result on {got.device}")
        if got.requires_grad != want.requires_grad or (got.grad_fn is None) != (want.grad_fn is None):
            raise AssertionError(f"{what}: autograd lost, grad_fn {got.grad_fn} instead of {want.grad_fn}")
        if values:
            torch.testing.assert_close(got.detach().cpu(), want.detach(), equal_nan=True, msg=lambda m: f"{what}: {m}")
        elif got.shape != want.shape or got.dtype != want.dtype:
            raise AssertionError(f"{what}: {got.shape} {got.dtype} instead of {want.shape} {want.dtype}")


def _gradients(outputs: Any, inputs: Any) -> list[torch.Tensor | None]:
    roots = [t for t in _tensors(outputs) if t.requires_grad and t.numel()]
    leaves = [t for t in _tensors(inputs) if t.requires_grad]
    if not roots or not leaves:
        return []
    with torch.random.fork_rng(devices=[0]):
        total = sum((t.abs() if t.is_complex() else t).float().sum() for t in roots)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))  # type: ignore[arg-type]


def _one(info: Any, sample: Any) -> None:
    arguments = (sample.input, sample.args, sample.kwargs)
    moved = to_cuda(arguments)
    function: Callable[..., Any] = info.op

    def run(values: Any) -> tuple[Any, list[torch.Tensor | None]]:
        first, rest, named = values
        outputs = function(first, *rest, **named)
        return outputs, _gradients(outputs, values)

    try:
        expected, wanted = run(arguments)
    except Exception:  # noqa: BLE001  what the CPU refuses is not compared
        return
    got, gradients = run(moved)
    values = info.name not in _RANDOM and info.name not in _UNDEFINED and not info.name.startswith("torch.ops.aten._")
    _compare(got, expected, values, "forward")
    if values:
        _compare([g for g in gradients if g is not None], [w for w in wanted if w is not None], True, "backward")


def check(info: Any) -> str | None:
    """Run some samples of one operator; the first difference or error, as text."""
    dtype = _type_of(info)
    if dtype is None or name_of(info) in HOST_ONLY or not info.supports_dtype(dtype, "cuda"):
        return None
    grad = bool(info.supports_autograd and (dtype.is_floating_point or dtype.is_complex))
    torch.manual_seed(0)
    random.seed(0)
    for number, sample in enumerate(_samples(info, dtype, grad)):
        try:
            _one(info, sample)
        except Exception as error:  # noqa: BLE001  reported with its name
            return f"sample {number}: {type(error).__name__}: {str(error)[:400]}"
    return None


def _samples(info: Any, dtype: torch.dtype, grad: bool) -> Iterator[Any]:
    for number, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=grad)):
        if number >= SAMPLES:
            return
        yield sample
