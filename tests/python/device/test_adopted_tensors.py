"""An adopted module's tensors in use: pointed elsewhere, converted, shared, with hooks, compiled and captured.

What an adoption itself does, its copies and its failures, is in ``test_adopt.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import adopting
import managed
import pytest
import sire
import torch
from adopting import Net, assert_equal, state, twin, used
from sire._adopt import Adopted, Mode, adopt

MIB = 1 << 20


@pytest.fixture
def adopted_ones() -> Iterator[list[Adopted]]:
    """As `adopting.released`."""
    yield from adopting.released()


@pytest.fixture
def pools() -> Iterator[None]:
    """As `managed.fresh`."""
    yield from managed.fresh()


def test_tensors_that_were_pointed_elsewhere_are_found(adopted_ones: list[Adopted]) -> None:
    net = Net()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat * 2, net.parameters())
    net.register_buffer("late", torch.arange(10, device="cuda"))
    expected = state(net)
    adopted.offload()
    assert {each.device.type for each in [*net.parameters(), *net.buffers()]} == {"cpu"}
    assert_equal(state(net), expected)
    net.half()
    expected = state(net)
    adopted.load()
    assert net.one.weight.dtype == torch.half
    assert all(each.is_cuda for each in [*net.parameters(), *net.buffers()])
    assert_equal(state(net), expected)
    assert net.tied.weight is net.one.weight
    fresh = {name: torch.randn(each.shape) for name, each in net.state_dict().items() if name != "late"}
    adopted.offload()
    net.load_state_dict(fresh, strict=False, assign=True)
    adopted.load()
    for name, each in net.named_parameters():
        assert each.is_cuda
        assert torch.equal(each.cpu(), fresh[name]), name


@pytest.mark.parametrize("mutable", [False, True])
@pytest.mark.parametrize("way", ["view", "paused"])
@pytest.mark.parametrize("loaded", [False, True])
def test_weights_that_are_taken_out_of_a_module_keep_their_content(
    adopted_ones: list[Adopted], loaded: bool, way: Mode, mutable: bool
) -> None:
    """They lay in the module's memory, and went with it."""
    net = Net()
    adopted = adopt(net, mode=way, mutable=mutable)
    adopted_ones.append(adopted)
    adopted.load()
    with torch.no_grad():
        net.two.weight.mul_(2)
    expected = state(net)
    if not loaded:
        adopted.offload()
    backup, head, net.tied = net.two.weight, net.tied, torch.nn.Identity()
    net.two.weight = torch.nn.Parameter(torch.zeros_like(backup))
    for _ in range(2):
        adopted.load()
        adopted.offload()
        assert way == "paused" or torch.equal(net.two.weight, torch.zeros(256, 256))
        assert torch.equal(backup, expected["two.weight"])
        assert torch.equal(head.bias, expected["tied.bias"])
    net.two.weight, net.tied = backup, head
    adopted.load()
    assert_equal(state(net), expected)
    assert backup.is_cuda


@pytest.mark.parametrize("way", ["view", "paused"])
@pytest.mark.parametrize("by", ["an offload", "somebody else"])
def test_a_tensor_that_is_pointed_elsewhere_leaves_those_beside_it_as_they_are(
    adopted_ones: list[Adopted], by: str, way: Mode
) -> None:
    """The others were to move to a block of their own, and were read while their memory was away."""
    net = Net()
    adopted = adopt(net, mode=way)
    adopted_ones.append(adopted)
    expected = state(net)
    adopted.load()
    if by == "an offload":
        adopted.offload()
    else:
        sire.pause(adopted.tag)
    net.one.weight.data = torch.zeros(256, 256)
    adopted.load()
    zeros = {name: torch.zeros(256, 256) for name in ("one.weight", "tied.weight") if name in expected}
    assert_equal(state(net), expected | zeros)


def test_views_that_are_taken_out_of_a_module_stay_views(adopted_ones: list[Adopted]) -> None:
    net = Net()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    norm, part, expected = net.norm, net.part, state(net)
    net.norm, net.part = torch.nn.Identity(), None
    adopted.sync()
    assert torch.equal(norm.running_mean, expected["norm.running_mean"])
    part.add_(1)
    assert torch.equal(norm.running_mean[:128], expected["part"] + 1)


@pytest.mark.parametrize("how", ["to", "adopt"])
def test_a_part_that_is_taken_out_of_a_module_is_nobodys(adopted_ones: list[Adopted], how: str) -> None:
    """Nothing moved it any more: it was still taken for the module's."""
    net = Net()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    expected = state(net)
    old, net.two = net.two, torch.nn.Identity()
    if how == "to":
        old.to("cuda")
    else:
        adopted.sync()
        adopted_ones.append(adopt(old))
        adopted_ones[-1].load()
    assert old.weight.is_cuda
    adopted.load()
    adopted.offload()
    assert old.weight.is_cuda
    assert torch.equal(old.weight.cpu(), expected["two.weight"])


@pytest.mark.parametrize("loaded", [False, True])
def test_wishes_for_a_device_change_nothing_and_those_for_a_dtype_need_no_room(
    adopted_ones: list[Adopted], loaded: bool
) -> None:
    torch.zeros(1, device="cuda")
    net = Net(width=2048)
    before = state(net)
    adopted = adopt(net)
    adopted_ones.append(adopted)
    if loaded:
        adopted.load()
    there = used()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for wish in (lambda: net.to("cuda"), lambda: net.cuda(), lambda: net.cpu(), lambda: net.to(torch.float32)):
        assert wish() is net
        assert {each.is_cuda for each in net.parameters()} == {loaded}
        assert used() == there
    net.half()
    assert {each.dtype for each in net.parameters()} == {torch.half}
    assert {each.is_cuda for each in net.parameters()} == {loaded}
    assert torch.cuda.max_memory_allocated() - held < MIB
    assert used() <= there
    halves = {name: each.half() if each.is_floating_point() else each for name, each in before.items()}
    assert_equal(state(net), halves)
    adopted.load()
    assert_equal(state(net), halves)
    assert adopted.nbytes < 0.51 * sum(each.nbytes for each in before.values())
    net._apply(lambda tensor: tensor * 2)
    assert torch.equal(net.two.bias.cpu(), halves["two.bias"] * 2)
    plain = torch.nn.Linear(2, 2).cuda()
    assert plain.weight.is_cuda


def test_shared_tensors_belong_to_one(adopted_ones: list[Adopted]) -> None:
    whole = torch.nn.Sequential(Net(0), Net(1))
    part = whole[0]
    inner = adopt(part)
    outer = adopt(whole)
    adopted_ones += [inner, outer]
    assert outer.shares == (inner,)
    outer.load()
    assert all(each.is_cuda for each in whole.parameters())
    outer.offload()
    assert part.one.weight.is_cuda
    assert not whole[1].one.weight.is_cuda
    with pytest.raises(sire.InvalidArgumentError, match="already"):
        adopt(whole)
    with pytest.raises(sire.InvalidArgumentError, match="cannot be given"):
        adopt(Net(), tag=inner.tag)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_what_a_part_released_is_the_wholes(adopted_ones: list[Adopted], loaded: bool, begins: bool) -> None:
    """The whole could not be loaded any more: it loaded the part, which said that it was released."""
    whole = torch.nn.Sequential(Net(0), Net(1))
    expected = state(whole)
    inner = adopt(whole[0])
    outer = adopt(whole)
    adopted_ones += [inner, outer]
    outer.load()
    if not loaded:
        outer.offload()
        inner.offload()
    inner.release()
    assert not begins or outer.begin() is not loaded
    outer.load()
    assert outer.shares == ()
    assert all(each.is_cuda for each in whole.parameters())
    outer.offload()
    assert not any(each.is_cuda for each in whole.parameters())
    assert_equal(state(whole), expected)


def test_a_forward_that_waits_for_backward_is_known(adopted_ones: list[Adopted]) -> None:
    net = Net().train()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    assert not adopted.waits_for_backward
    loss = net(torch.randn(4, 256, device="cuda")).sum()
    assert adopted.waits_for_backward
    loss.backward()
    del loss
    assert not adopted.waits_for_backward


def test_subclasses_are_taken_apart(adopted_ones: list[Adopted]) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    net = torch.nn.Linear(64, 64, bias=False)
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    net.weight = torch.nn.Parameter(TwoTensor(a.clone(), b.clone()))
    adopted = adopt(net)
    adopted_ones.append(adopted)
    for _ in range(2):
        adopted.load()
        assert net.weight.device.type == "cuda"
        assert torch.equal(net.weight.a.cpu(), a)
        assert torch.equal(net.weight.b.cpu(), b)
        adopted.offload()


def test_hooks_on_accumulation_survive(adopted_ones: list[Adopted]) -> None:
    """As DistributedDataParallel makes them: another device for the parameter's data would lose them."""
    net = torch.nn.Linear(8, 8).cuda()
    called: list[int] = []
    nodes = []
    for each in net.parameters():
        node = each.view_as(each).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_: called.append(1))
        nodes.append(node)
    adopted = adopt(net)
    adopted_ones.append(adopted)
    for number in (1, 2):
        adopted.load()
        net(torch.ones(1, 8, device="cuda")).sum().backward()
        assert len(called) == 2 * number
        adopted.offload()
        assert net.weight.is_cuda, "paused, not shown on the host"


def _gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.func.grad(lambda x: function(x).sum())(x)
    return found


def _tangent(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
    return found


@pytest.mark.parametrize("transform", [_gradient, _tangent, lambda function, x: torch.func.vmap(function)(x)])
@pytest.mark.parametrize("by_hook", [False, True])
@pytest.mark.usefixtures("pools")
def test_a_module_may_come_and_go_inside_of_transforms(
    by_hook: bool, transform: Callable[[Any, torch.Tensor], torch.Tensor]
) -> None:
    """What pointed its tensors to the device was transformed, too: they lost their memory, and the process ended."""
    net, x = managed.layers().eval(), torch.ones(2, 32, device="cuda")
    before, expected = state(net), transform(managed.layers().eval().cuda(), x)

    def called(x: torch.Tensor) -> torch.Tensor:
        with sire.auto_manage(net):
            result: torch.Tensor = net(x)
        return result

    if by_hook:
        sire.AutoManageHook.manage_module(net)
    for _ in range(2):
        assert torch.equal(transform(net if by_hook else called, x), expected)
        assert {each.device.type for each in net.parameters()} == {"cpu"}
        assert_equal(state(net), before)


def test_compiled_modules_are_not_compiled_again(adopted_ones: list[Adopted]) -> None:
    net, reference = Net().eval(), twin().eval().cuda()
    adopted = adopt(net)
    adopted_ones.append(adopted)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.randn(4, 256, device="cuda")
    with torch.no_grad():
        expected = reference(x)
        for number in range(3):
            adopted.load()
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                assert torch.allclose(compiled(x), expected, atol=1e-6)
            adopted.offload()


def test_captured_graphs_go_on(adopted_ones: list[Adopted]) -> None:
    net = torch.nn.Linear(256, 256)
    adopted = adopt(net)
    adopted_ones.append(adopted)
    adopted.load()
    with torch.no_grad():
        x, y = torch.zeros(4, 256, device="cuda"), torch.zeros(4, 256, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            y.copy_(net(x))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y.copy_(net(x))
            with pytest.raises(sire.CapturingError):
                adopted.offload()
        for number in range(2):
            adopted.offload()
            adopted.load()
            x.fill_(number + 1)
            graph.replay()
            assert torch.equal(y, net(x))
