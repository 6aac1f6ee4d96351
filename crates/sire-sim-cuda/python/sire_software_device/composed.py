"""Operations that PyTorch has for CUDA only, composed here from CPU operations; each gets CPU aliases and returns CPU results.

`RUN` replaces a CPU kernel that does not exist, `RANDOM` names those that need a generator which their schema lacks, and
`DIRECT` answers questions about backends without looking at any operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _sum(first: Tensor, second: Tensor, *biases: Tensor | None) -> Tensor:
    total = first + second
    for bias in biases:
        if bias is not None:
            total = total + bias
    return total


def lstm_cell(
    input_gates: Tensor, hidden_gates: Tensor, cx: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of an LSTM: (hy, cy, the activated gates for the backward pass)."""
    i, f, g, o = _sum(input_gates, hidden_gates, input_bias, hidden_bias).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat((i, f, g, o), -1)


def lstm_cell_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `lstm_cell`: of the gates, of cx, of a bias."""
    if grad_hy is None and grad_cy is None:
        return None, None, None
    i, f, g, o = workspace.chunk(4, -1)
    squashed = cy.tanh()
    grad_c = torch.zeros_like(cx) if grad_cy is None else grad_cy
    grad_o = torch.zeros_like(o)
    if grad_hy is not None:
        grad_c = grad_c + grad_hy * o * (1 - squashed * squashed)
        grad_o = grad_hy * squashed * o * (1 - o)
    gates = torch.cat((grad_c * g * i * (1 - i), grad_c * cx * f * (1 - f), grad_c * i * (1 - g * g), grad_o), -1)
    return gates, grad_c * f, gates.sum(0) if has_bias else None


def gru_cell(
    input_gates: Tensor, hidden_gates: Tensor, hx: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of a GRU: (hy, what the backward pass needs)."""
    ir, iz, in_ = (input_gates if input_bias is None else input_gates + input_bias).chunk(3, -1)
    hr, hz, hn = (hidden_gates if hidden_bias is None else hidden_gates + hidden_bias).chunk(3, -1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (in_ + r * hn).tanh()
    return n + z * (hx - n), torch.cat((r, z, n, hx, hn), -1)


def gru_cell_backward(grad_hy: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    """Gradients of `gru_cell`: of both gates, of hx, of both biases."""
    r, z, n, hx, hn = workspace.chunk(5, -1)
    grad_z = grad_hy * (hx - n) * z * (1 - z)
    grad_n = grad_hy * (1 - z) * (1 - n * n)
    grad_r = grad_n * hn * r * (1 - r)
    of_input = torch.cat((grad_r, grad_z, grad_n), -1)
    of_hidden = torch.cat((grad_r, grad_z, grad_n * r), -1)
    biases = (of_input.sum(0), of_hidden.sum(0)) if has_bias else (None, None)
    return of_input, of_hidden, grad_hy * z, *biases


def _keep(input: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(input, dtype=torch.bool).bernoulli_(share, generator=generator)


def native_dropout(input: Tensor, p: float, train: bool | None, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Dropout and its mask."""
    if train is False or input.numel() == 0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    mask = _keep(input, 1 - p, generator)
    return input * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


def fused_dropout(input: Tensor, p: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Dropout that keeps with probability p; the mask is of bytes."""
    mask = _keep(input, p, generator)
    return input * mask * (1 / p), mask.to(torch.uint8)


def masked_scale(input: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The backward pass of `fused_dropout`."""
    return input * mask.to(input.dtype) * scale


def _in_type(operation: Callable[..., Tensor], tensors: int) -> Callable[..., Tensor]:
    """A matrix product whose operands are narrower than its result."""

    def run(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        wide = args[tensors]
        result = operation(*(tensor.to(wide) for tensor in args[:tensors]), **kwargs)
        if out is None:
            return result
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return run


def rms_norm_backward(
    grad_out: Tensor, input: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of root-mean-square normalisation: of the input and of the weight."""
    dims = list(range(-len(shape), 0))
    wide = torch.promote_types(input.dtype, torch.float32)
    scale = rstd.to(wide)
    normal = input.to(wide) * scale.reshape(list(input.shape[: input.dim() - len(shape)]) + [1] * len(shape))
    grad = grad_out.to(wide)
    weighted = grad if weight is None else grad * weight.to(wide)
    of_input = of_weight = None
    if output_mask[0]:
        spread = scale.reshape(list(input.shape[: input.dim() - len(shape)]) + [1] * len(shape))
        of_input = (spread * (weighted - normal * (weighted * normal).mean(dims, keepdim=True))).to(input.dtype)
    if output_mask[1] and weight is not None:
        outer = list(range(input.dim() - len(shape)))
        of_weight = ((grad * normal).sum(outer) if outer else grad * normal).to(weight.dtype)
    return of_input, of_weight


def _no_dropout(share: float) -> None:
    if share:
        raise NotImplementedError("fused attention with dropout has no CPU kernel; choose SDPBackend.MATH")


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Flash attention by the CPU's kernel of that name."""
    _no_dropout(dropout_p)
    out, logsumexp = _flash(query, key, value, 0.0, is_causal, scale=scale)
    state = torch.empty(2, dtype=torch.uint64)
    return out, logsumexp, None, None, query.size(2), key.size(2), state, torch.empty(0), torch.empty(0)


def flash_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, seed: Tensor, offset: Tensor, *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of `flash_attention`."""
    result: tuple[Tensor, ...] = _flash_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, scale=scale)
    return result


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Memory-efficient attention, which has a bias besides."""
    _no_dropout(dropout_p)
    out, logsumexp = _flash(query, key, value, 0.0, is_causal, attn_mask=attn_bias, scale=scale)
    return out, logsumexp, torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)


def efficient_attention_backward(
    grad_out: Tensor | None, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, out: Tensor, logsumexp: Tensor,
    seed: Tensor, offset: Tensor, dropout_p: float, grad_input_mask: list[bool], is_causal: bool = False, *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of `efficient_attention`; a bias that wants one is refused."""
    if grad_out is None:
        return None, None, None, None
    if grad_input_mask[3] and attn_bias is not None:
        raise NotImplementedError("the gradient of an attention bias has no CPU kernel; choose SDPBackend.MATH")
    grads = _flash_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask=attn_bias, scale=scale)
    return *grads, None


RUN: dict[str, Callable[..., Any]] = {
    "aten::_thnn_fused_lstm_cell": lstm_cell,
    "aten::_thnn_fused_lstm_cell_backward_impl": lstm_cell_backward,
    "aten::_thnn_fused_gru_cell": gru_cell,
    "aten::_thnn_fused_gru_cell_backward": gru_cell_backward,
    "aten::native_dropout": native_dropout,
    "aten::_fused_dropout": fused_dropout,
    "aten::_masked_scale": masked_scale,
    "aten::mm.dtype": _in_type(torch.mm, 2),
    "aten::mm.dtype_out": _in_type(torch.mm, 2),
    "aten::bmm.dtype": _in_type(torch.bmm, 2),
    "aten::bmm.dtype_out": _in_type(torch.bmm, 2),
    "aten::addmm.dtype": _in_type(torch.addmm, 3),
    "aten::addmm.dtype_out": _in_type(torch.addmm, 3),
    "aten::baddbmm.dtype": _in_type(torch.baddbmm, 3),
    "aten::baddbmm.dtype_out": _in_type(torch.baddbmm, 3),
    "aten::_fused_rms_norm_backward": rms_norm_backward,
    "aten::_scaled_dot_product_flash_attention": flash_attention,
    "aten::_scaled_dot_product_flash_attention_backward": flash_attention_backward,
    "aten::_scaled_dot_product_efficient_attention": efficient_attention,
    "aten::_scaled_dot_product_efficient_attention_backward": efficient_attention_backward,
}

RANDOM = frozenset({"aten::native_dropout"})

DIRECT: dict[str, Callable[..., Any]] = {
    "aten::_fused_sdp_choice": lambda *args, **kwargs: 0,
    "aten::_use_cudnn_ctc_loss": lambda *args, **kwargs: False,
    "aten::_use_cudnn_ctc_loss.Tensor": lambda *args, **kwargs: False,
    "aten::_use_miopen_ctc_loss": lambda *args, **kwargs: False,
    "aten::_use_miopen_ctc_loss.Tensor": lambda *args, **kwargs: False,
}
