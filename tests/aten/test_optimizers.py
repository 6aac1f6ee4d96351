"""Optimizers, gradient scaling and autocast: training on the device follows training on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

_OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {}),
    "SGD momentum foreach": ("SGD", {"momentum": 0.9, "foreach": True}),
    "SGD fused": ("SGD", {"fused": True, "momentum": 0.9}),
    "Adam": ("Adam", {}),
    "Adam foreach": ("Adam", {"foreach": True, "amsgrad": True}),
    "Adam fused": ("Adam", {"fused": True}),
    "AdamW": ("AdamW", {"foreach": False}),
    "AdamW fused": ("AdamW", {"fused": True, "amsgrad": True}),
    "RMSprop": ("RMSprop", {"momentum": 0.5}),
    "Adagrad": ("Adagrad", {}),
    "Adamax": ("Adamax", {}),
    "NAdam": ("NAdam", {}),
    "RAdam": ("RAdam", {}),
    "Rprop": ("Rprop", {}),
    "ASGD": ("ASGD", {}),
    "Adadelta": ("Adadelta", {}),
}


def _train(model: Any, optimizer: Any, place: str) -> None:
    torch.manual_seed(2)
    x, target = torch.randn(16, 6).to(place), torch.randint(0, 3, (16,)).to(place)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def _model() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("name", list(_OPTIMIZERS))
def test_training_follows_the_cpu(name: str) -> None:
    """Four steps, equal parameters."""
    kind, options = _OPTIMIZERS[name]
    host = _model()
    device = copy.deepcopy(host).cuda()
    plain = {key: value for key, value in options.items() if key not in ("fused", "foreach")}
    _train(host, getattr(torch.optim, kind)(host.parameters(), lr=0.05, **plain), "cpu")
    _train(device, getattr(torch.optim, kind)(device.parameters(), lr=0.05, **options), "cuda")
    for mine, theirs in zip(device.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"capturable": True}, {"capturable": True, "fused": True}])
def test_capturable_state_is_on_the_device(options: dict[str, Any]) -> None:
    """The step counters of a capturable Adam are device tensors."""
    model = _model().cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, **options)
    _train(model, optimizer, "cuda")
    assert all(state["step"].is_cuda and state["step"].item() == 4 for state in optimizer.state.values())


def test_gradient_scaler_skips_infinite_steps() -> None:
    """Scale, unscale, skip on infinity, halve the scale, clip."""
    model = _model().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cuda", torch.float16):
        loss = model(torch.ones(2, 6, device="cuda")).float().sum() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(2, 6, device="cuda")).sum()).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert norm.is_cuda
    scaler.step(optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: Any) -> None:
    """Matrix products in half precision, reductions in single, gradients in the parameters' type."""
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8)).cuda()
    with torch.autocast("cuda", dtype):
        hidden = model[:3](torch.randn(2, 4, 6, device="cuda"))
        loss = nn.functional.cross_entropy(model[3](hidden), torch.tensor([1, 2], device="cuda"))
    assert hidden.dtype is dtype
    assert loss.dtype is torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


def test_half_precision_where_the_cpu_has_none() -> None:
    """Operations that the CPU knows only in single precision are rounded from it."""
    x = torch.rand(4, 4, device="cuda").half() + torch.eye(4, device="cuda").half()
    for run in (torch.cumsum, torch.cumprod):
        assert run(x, 0).dtype is torch.float16
    for run in (torch.erfinv, torch.special.i0, torch.lgamma, torch.exp, torch.sigmoid):
        got = run(x * 0.5)
        torch.testing.assert_close(got.cpu().float(), run((x * 0.5).cpu().float()), rtol=1e-2, atol=1e-2)
