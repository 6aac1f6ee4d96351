"""Modules of torch.nn on the device against the CPU: outputs, gradients of inputs and of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

_IMAGE, _TOKENS, _SERIES = (2, 3, 8, 8), (2, 5, 16), (5, 2, 8)

_MODULES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 8), _TOKENS),
    "bilinear": (lambda: _Twice(nn.Bilinear(16, 16, 4)), _TOKENS),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3), _TOKENS),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1, stride=2), _IMAGE),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), _IMAGE),
    "conv_transpose": (lambda: nn.ConvTranspose2d(3, 4, 3), _IMAGE),
    "batch_norm": (lambda: nn.BatchNorm2d(3), _IMAGE),
    "layer_norm": (lambda: nn.LayerNorm(16), _TOKENS),
    "rms_norm": (lambda: nn.RMSNorm(16), _TOKENS),
    "group_norm": (lambda: nn.GroupNorm(3, 3), _IMAGE),
    "pooling": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)), _IMAGE),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), _IMAGE),
    "activations": (lambda: nn.Sequential(nn.GELU(), nn.SiLU(), nn.Mish(), nn.Softmax(-1), nn.PReLU()), _TOKENS),
    "attention": (lambda: _Self(nn.MultiheadAttention(16, 4, batch_first=True)), _TOKENS),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 4, dropout=0.0, batch_first=True), _TOKENS),
    "lstm": (lambda: nn.LSTM(8, 6), _SERIES),
    "lstm_deep": (lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True), _SERIES),
    "lstm_projected": (lambda: nn.LSTM(8, 6, proj_size=3), _SERIES),
    "lstm_no_bias": (lambda: nn.LSTM(8, 6, bias=False), _SERIES),
    "gru": (lambda: nn.GRU(8, 6), _SERIES),
    "gru_deep": (lambda: nn.GRU(8, 6, num_layers=2, bidirectional=True, batch_first=True), _SERIES),
    "gru_no_bias": (lambda: nn.GRU(8, 6, bias=False), _SERIES),
    "rnn": (lambda: nn.RNN(8, 6, num_layers=2, bidirectional=True), _SERIES),
    "rnn_relu": (lambda: nn.RNN(8, 6, nonlinearity="relu"), _SERIES),
    "packed_lstm": (lambda: _Packed(nn.LSTM(8, 6, bidirectional=True)), _SERIES),
    "packed_gru": (lambda: _Packed(nn.GRU(8, 6, num_layers=2)), _SERIES),
    "lstm_cell": (lambda: nn.LSTMCell(16, 4), (3, 16)),
    "gru_cell": (lambda: nn.GRUCell(16, 4), (3, 16)),
}


class _Self(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return self.inner(x, x, x)


class _Twice(_Self):
    def forward(self, x: Any) -> Any:
        return self.inner(x, x)


class _Packed(_Self):
    def forward(self, x: Any) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.inner(packed)[0])[0]


def _first(result: Any) -> Any:
    return result if isinstance(result, torch.Tensor) else _first(result[0])


@pytest.mark.parametrize("name", list(_MODULES))
def test_module_agrees_with_the_cpu(name: str) -> None:
    """Same parameters, same input: same output and same gradients, all of them present."""
    make, shape = _MODULES[name]
    torch.manual_seed(1)
    host = make()
    device = copy.deepcopy(host).to("cuda")
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().cuda().requires_grad_()
    expected, got = _first(host(x)), _first(device(y))
    assert got.is_cuda
    assert got.grad_fn is not None
    expected.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(got.cpu(), expected)
    torch.testing.assert_close(y.grad.cpu(), x.grad)
    for (label, mine), theirs in zip(device.named_parameters(), host.parameters(), strict=True):
        assert mine.grad is not None, label
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad)


def test_embedding_and_losses() -> None:
    """Gathers and scatters in the backward pass."""
    torch.manual_seed(1)
    host = nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 4))
    device = copy.deepcopy(host).cuda()
    tokens, target = torch.randint(0, 10, (6, 3)), torch.randint(0, 4, (6,))
    one, two = nn.functional.cross_entropy(host(tokens), target), nn.functional.cross_entropy(device(tokens.cuda()), target.cuda())
    one.backward()
    two.backward()
    for mine, theirs in zip(device.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad)


@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_every_backend(backend: str, causal: bool) -> None:
    """Scaled dot-product attention, also where a program insists on a fused form."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(1)
    host = [torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3)]
    dtype = torch.float32 if backend != "FLASH_ATTENTION" else torch.bfloat16
    device = [t.detach().to("cuda", dtype).requires_grad_() for t in host]
    expected = nn.functional.scaled_dot_product_attention(*host, is_causal=causal)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        got = nn.functional.scaled_dot_product_attention(*device, is_causal=causal)
    expected.square().sum().backward()
    got.float().square().sum().backward()
    slack = {"rtol": 0.1, "atol": 0.1} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got.float().cpu(), expected, **slack)
    for mine, theirs in zip(device, host, strict=True):
        torch.testing.assert_close(mine.grad.float().cpu(), theirs.grad, **slack)


def test_double_backward() -> None:
    """A gradient of a gradient, through a convolution and an LSTM."""
    torch.manual_seed(1)
    for make, shape in ((lambda: nn.Conv2d(3, 2, 3), _IMAGE), (lambda: nn.LSTM(8, 4), _SERIES)):
        host = make()
        device = copy.deepcopy(host).cuda()
        results = []
        for module, place in ((host, "cpu"), (device, "cuda")):
            torch.manual_seed(2)
            x = torch.randn(shape).to(place).requires_grad_()
            (first,) = torch.autograd.grad(_first(module(x)).tanh().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            results.append(second.cpu())
        torch.testing.assert_close(results[0], results[1])
