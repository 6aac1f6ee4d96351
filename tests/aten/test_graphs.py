"""CUDA graphs of aten operations: nothing runs while the stream records, every replay computes anew on the same addresses."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")


def _warm(run: Any) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def test_replay_computes_on_the_same_addresses() -> None:
    """Reads, writes, views, reductions, out= and lists."""
    x, w = torch.ones(4, 4, device="cuda"), torch.eye(4, device="cuda") * 2
    total = torch.zeros((), device="cuda")
    target = torch.empty(4, 4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x @ w).relu()
        torch.add(y, 1, out=target)
        total.add_(y.sum())
        parts = torch._foreach_mul([x, y], 3.0)
        top, where = y.t().topk(2, dim=0)
    assert total.item() == 0.0, "nothing may run while the stream records"
    for value in (1.0, 5.0):
        x.fill_(value)
        total.zero_()
        graph.replay()
        assert y.sum().item() == 32 * value
        assert total.item() == 32 * value
        assert target.sum().item() == 32 * value + 16
        assert parts[0].sum().item() == 48 * value
        assert parts[1].sum().item() == 96 * value
        assert top.shape == where.shape == (2, 4)
        assert top.sum().item() == 16 * value


def test_forward_backward_and_step_in_one_graph() -> None:
    """A whole training step, against the same steps without a graph."""
    results = []
    for captured in (False, True):
        torch.manual_seed(4)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, capturable=True)
        x = torch.ones(3, 4, device="cuda")

        def step(model: Any = model, optimizer: Any = optimizer, x: Any = x) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        for _ in range(2):
            _warm(step)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        for _ in range(3):
            graph.replay() if captured else step()
        results.append([p.detach().cpu() for p in model.parameters()])
    for plain, replayed in zip(*results, strict=True):
        torch.testing.assert_close(plain, replayed)


def test_random_numbers_differ_at_each_replay_and_follow_the_seed() -> None:
    """Dropout and normal draws; the generator advances by what the graph uses."""
    noise = torch.empty(100, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise.normal_()
        mask = torch.nn.functional.dropout(torch.ones(100, device="cuda"), 0.5)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        graph.replay()
        first = (noise.clone(), mask.clone())
        graph.replay()
        runs.append((*first, noise.clone(), mask.clone()))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(runs[0][0], runs[0][2])
    assert not torch.equal(runs[0][1], runs[0][3])


@pytest.mark.parametrize("name", ["item", "nonzero", "masked_select", "equal"])
def test_what_needs_the_host_is_refused(name: str) -> None:
    """CUDA's own error, and the device stays usable."""
    x = torch.ones(4, device="cuda")
    run = {
        "item": lambda: x.sum().item(), "nonzero": lambda: x.nonzero(), "masked_select": lambda: x[x > 0],
        "equal": lambda: torch.equal(x, x),
    }[name]  # fmt: skip
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    assert (x + 1).sum().item() == 8.0


def test_make_graphed_callables() -> None:
    """PyTorch's own wrapper, with gradients through the graph."""
    torch.manual_seed(1)
    module = torch.nn.Linear(4, 4).cuda()
    sample = torch.randn(2, 4, device="cuda", requires_grad=True)
    with torch.no_grad():
        expected = module(sample)
    graphed = torch.cuda.make_graphed_callables(module, (sample,))
    x = sample.detach().clone().requires_grad_()
    out = graphed(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(x.grad, module.weight.detach().sum(0).expand(2, 4))


def test_closures_live_as_long_as_the_graph() -> None:
    """No closure is left after the graph is gone, and none is added by eager operations."""
    from sire_software_device import runtime

    gc.collect()
    torch.cuda.synchronize()
    before = runtime.kept()
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(2)
    assert runtime.kept() > before
    graph.replay()
    gone = weakref.ref(graph)
    del graph
    gc.collect()
    torch.cuda.synchronize()
    assert gone() is None
    assert x.sum().item() == 8.0
    assert runtime.kept() == before
    (x + 1).sum().item()
    assert runtime.kept() == before
