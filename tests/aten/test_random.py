"""Random numbers: determined by the seed, advancing, saved and restored through PyTorch's own CUDA generator."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


def test_manual_seed_determines_the_numbers() -> None:
    """Both the global seed and the device's own."""
    for seed in (torch.manual_seed, torch.cuda.manual_seed, torch.cuda.manual_seed_all):
        seed(7)
        first = torch.randn(100, device="cuda")
        second = torch.randn(100, device="cuda")
        seed(7)
        assert torch.equal(first, torch.randn(100, device="cuda"))
        assert torch.equal(second, torch.randn(100, device="cuda"))
        assert not torch.equal(first, second)


def test_state_is_saved_restored_and_advances() -> None:
    """get_rng_state, set_rng_state, fork_rng; the CPU's generator is left alone."""
    torch.manual_seed(3)
    host = torch.get_rng_state()
    state = torch.cuda.get_rng_state()
    first = torch.rand(5, device="cuda")
    assert not torch.equal(state, torch.cuda.get_rng_state())
    torch.nn.functional.dropout(torch.ones(8, device="cuda"), 0.5)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(5, device="cuda"))
    with torch.random.fork_rng(devices=[0]):
        inside = torch.rand(5, device="cuda")
    assert torch.equal(inside, torch.rand(5, device="cuda"))
    assert torch.equal(host, torch.get_rng_state())


def test_own_generators() -> None:
    """A generator of the program, and one of the wrong device."""
    generator = torch.Generator(device="cuda").manual_seed(5)
    first = torch.randint(0, 1000, (20,), device="cuda", generator=generator)
    assert not torch.equal(first, torch.randint(0, 1000, (20,), device="cuda", generator=generator))
    generator.manual_seed(5)
    assert torch.equal(first, torch.randint(0, 1000, (20,), device="cuda", generator=generator))
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator("cpu"))


def test_distributions_look_right() -> None:
    """Moments, ranges, and dropout's scale."""
    torch.manual_seed(0)
    normal = torch.randn(20000, device="cuda")
    assert abs(normal.mean().item()) < 0.05
    assert abs(normal.std().item() - 1) < 0.05
    uniform = torch.rand(20000, device="cuda")
    assert uniform.min().item() >= 0
    assert uniform.max().item() < 1
    dropped = torch.nn.functional.dropout(torch.ones(20000, device="cuda"), 0.25)
    assert abs(dropped.mean().item() - 1) < 0.05
    assert sorted(torch.randperm(50, device="cuda").tolist()) == list(range(50))
    picked = torch.multinomial(torch.tensor([0.0, 1.0, 1.0], device="cuda"), 100, replacement=True)
    assert set(picked.tolist()) == {1, 2}


def test_dropout_has_its_gradient() -> None:
    """The mask of the forward pass is the gradient's."""
    x = torch.ones(1000, device="cuda", requires_grad=True)
    y = torch.nn.functional.dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
