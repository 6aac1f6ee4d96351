"""Operands on different devices raise PyTorch's own errors; what PyTorch permits works. A kinder device would hide bugs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

_TWO = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
_GOT = r"Expected all tensors to be on the same device, but got {} is on {}, different from other tensors on {} " r"\(when checking argument in method {}\)"


def _pair() -> tuple[Any, Any]:
    return torch.ones(3, 3, device="cuda"), torch.ones(3, 3)


_ITERATOR: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda g, c: g + c,
    "add reversed": lambda g, c: c + g,
    "add_ to device": lambda g, c: g.add_(c),
    "add_ to host": lambda g, c: c.add_(g),
    "where": lambda g, c: torch.where(g > 0, c, g),
    "mse_loss": lambda g, c: F.mse_loss(g, c),
    "lerp": lambda g, c: torch.lerp(g, c, 0.5),
    "maximum": lambda g, c: torch.maximum(g, c),
    "out of add": lambda g, c: torch.add(g, g, out=c),
    "out of exp": lambda g, c: torch.exp(g, out=c),
    "out 0-dim": lambda g, c: torch.sum(g, dim=(0, 1), out=torch.tensor(0.0)),
    "foreach": lambda g, c: torch._foreach_add([g], [c]),
    "foreach second": lambda g, c: torch._foreach_mul_([g, g], [g, c]),
    "index_put value": lambda g, c: g.__setitem__(torch.tensor([0], device="cuda"), c[0]),
}


@pytest.mark.parametrize("name", list(_ITERATOR))
def test_elementwise(name: str) -> None:
    """TensorIterator's text."""
    with pytest.raises(RuntimeError, match=_TWO):
        _ITERATOR[name](*_pair())


_STRICT: dict[str, tuple[Callable[[Any, Any], Any], tuple[str, str, str, str]]] = {
    "mm": (lambda g, c: g @ c, ("mat2", "cpu", "cuda:0", "wrapper_CUDA_mm")),
    "mm reversed": (lambda g, c: c @ g, ("mat2", "cuda:0", "cpu", "wrapper_CUDA_mm")),
    "linear": (lambda g, c: F.linear(g, c, c[0]), ("mat1", "cuda:0", "cpu", "wrapper_CUDA_addmm")),
    "bmm": (lambda g, c: torch.bmm(g[None], c[None]), ("mat2", "cpu", "cuda:0", "wrapper_CUDA_bmm")),
    "cat": (lambda g, c: torch.cat([g, c]), ("tensors", "cpu", "cuda:0", "wrapper_CUDA_cat")),
    "out of mm": (lambda g, c: torch.mm(g, g, out=c), ("out", "cpu", "cuda:0", "wrapper_CUDA_mm")),
    "embedding": (
        lambda g, c: F.embedding(torch.tensor([0]), g), ("index", "cpu", "cuda:0", "wrapper_CUDA__index_select"),
    ),
    "gather": (
        lambda g, c: g.gather(0, torch.zeros(1, 1, dtype=torch.long)), ("index", "cpu", "cuda:0", "wrapper_CUDA_gather"),
    ),
    "cross_entropy": (
        lambda g, c: F.cross_entropy(g, torch.tensor([0, 1, 2])),
        ("target", "cpu", "cuda:0", "wrapper_CUDA_nll_loss_forward"),
    ),
    "layer_norm": (
        lambda g, c: F.layer_norm(g, (3,), c[0]), ("weight", "cpu", "cuda:0", "wrapper_CUDA__native_layer_norm"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(_STRICT))
def test_generated_wrappers(name: str) -> None:
    """The text of operations that check every argument, with its name and the method's."""
    run, (argument, place, common, method) = _STRICT[name]
    text = _GOT.format(argument, place, common, method)
    with pytest.raises(RuntimeError, match=text if torch.__version__ >= (2, 12) else "same device"):
        run(*_pair())


def test_what_pytorch_permits() -> None:
    """0-dim CPU tensors where a number would do, CPU indices, copies."""
    g, c = _pair()
    scalar = torch.tensor(2.0)
    assert (g + scalar).is_cuda
    assert (scalar * g).is_cuda
    assert torch.where(g > 0, scalar, g).is_cuda
    assert g[torch.tensor([0, 2])].shape == (2, 3)
    assert g[c > 0].shape == (9,)
    g[torch.tensor([0])] = scalar
    assert g[0].tolist() == [2.0, 2.0, 2.0]
    c.copy_(g)
    g.t().copy_(c)
    with pytest.raises(RuntimeError, match=_TWO):
        torch.addcmul(g, c, scalar)


def test_device_indices_on_a_host_tensor() -> None:
    """The other way round is refused."""
    c = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"indices should be either on cpu or on the same device .*\(cpu\)"):
        c[torch.tensor([0], device="cuda")]


def test_convolution_names_both_types() -> None:
    """Convolution has a text of its own."""
    g, c = _pair()
    with pytest.raises(RuntimeError, match=r"Input type \(torch.cuda.FloatTensor\) and weight type \(torch.FloatTensor\)"):
        F.conv1d(g[None], c[None])


class _HostInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad @ torch.ones(3, 3)


def test_backward() -> None:
    """A host tensor met by a backward function on the device's own thread."""
    x = torch.ones(3, 3, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="same device"):
        _HostInBackward.apply(x).sum().backward()
    with pytest.raises(RuntimeError, match="expected device cuda:0 but got cpu"):
        (x * 2).backward(torch.ones(3, 3))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    lambda p: torch.optim.RMSprop(p, lr=0.1),
])  # fmt: skip
def test_optimizer_step_with_host_parameters(make: Callable[[Any], Any]) -> None:
    """Parameters moved to the host while their gradients stay on the device."""
    model = torch.nn.Linear(3, 3).cuda()
    optimizer = make(model.parameters())
    model(torch.ones(2, 3, device="cuda")).sum().backward()
    for parameter in model.parameters():
        parameter.data = parameter.data.cpu()
    with pytest.raises(RuntimeError, match="same device"):
        optimizer.step()


def test_optimizer_state_left_on_the_host() -> None:
    """State of an earlier step on the CPU, parameters and gradients on the device."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    moved = copy.deepcopy(optimizer.state_dict())
    model.cuda().zero_grad()
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.cpu()
    assert moved
    model(torch.ones(2, 3, device="cuda")).sum().backward()
    with pytest.raises(RuntimeError, match=r"same device|same dtype, device"):
        optimizer.step()


@pytest.mark.usefixtures("two_devices")
def test_two_devices() -> None:
    """cuda:0 against cuda:1, and what stays possible on and between them."""
    a, b = torch.ones(3, 3, device="cuda:0"), torch.ones(3, 3, device="cuda:1")
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cuda:1!"):
        a + b
    with pytest.raises(RuntimeError, match="same device"):
        a @ b
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([a, b])
    with pytest.raises(RuntimeError, match="found at least two devices"):
        a + torch.tensor(1.0, device="cuda:1")
    with pytest.raises(RuntimeError, match=r"indices should be .* \(cuda:0\)"):
        a[torch.tensor([0], device="cuda:1")]
    assert (b @ b).device == b.device
    assert (a + b.to(a.device)).sum().item() == 18.0
    assert torch.randn(3, device="cuda:1").device.index == 1
    a.copy_(b.t() * 3)
    assert a.sum().item() == 27.0
