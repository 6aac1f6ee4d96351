"""Backward passes that come after the use of a managed model: whatever it returned, and however it was called."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import managed
import pytest
import sire
import torch
from measure import MIB, on_software_device
from running import until
from sire._nested import tensors_in
from sire.models import _backward, _manage
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As `managed.fresh`."""
    yield from managed.fresh()


@dataclasses.dataclass
class Table:
    """As the outputs of transformers, which are dataclasses and tables."""

    hidden: torch.Tensor
    more: Any = None


class Attributes:
    """An object of the program's."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.inside = {"deep": [Table(hidden)], "itself": self}


class Slotted:
    """One without a table of attributes."""

    __slots__ = ("empty", "hidden")

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


Named = collections.namedtuple("Named", ["hidden"])


class Encoder(nn.Module):
    """A model that is called in several ways."""

    def __init__(self, wraps: Callable[[torch.Tensor], Any] = lambda hidden: hidden) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.wraps = wraps

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """A method beside forward."""
        return self.second(self.first(x))

    def forward(self, x: torch.Tensor) -> Any:
        return self.wraps(self.encode(x))


WAYS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a method": lambda model, x: model.encode(x),
    "modules inside": lambda model, x: model.second[0](model.first(x)).tanh(),
    "a checkpoint": lambda model, x: checkpoint(model.encode, x, use_reentrant=False),
    "in place": lambda model, x: model.second[0](model.first(x)).tanh_(),
}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [each.grad.cpu() for each in model.parameters()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_what_other_methods_returned_can_be_asked_for_a_backward(way: str, frozen: bool) -> None:
    """Only what a model's forward returned was watched: a backward of the output of ``model.encode(x)`` after the use
    was an illegal access, which ends the process's use of the device.
    """
    model, reference = Encoder().requires_grad_(not frozen), Encoder().cuda().requires_grad_(not frozen)
    x, y = (torch.ones(2, 8, device="cuda").requires_grad_() for _ in range(2))
    with sire.auto_manage(model):
        found = WAYS[way](model, x)
    assert not model.first.weight.is_cuda
    found.square().sum().backward()
    assert not model.first.weight.is_cuda
    WAYS[way](reference, y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    if not frozen:
        assert all(map(torch.equal, gradients(model), gradients(reference)))


@pytest.mark.parametrize("wraps", [Table, Attributes, Slotted, Named], ids=lambda each: each.__name__)
@pytest.mark.parametrize("by_itself", [True, False], ids=["hook", "auto_manage"])
def test_what_is_in_an_object_can_be_asked_for_a_backward(wraps: Callable[..., Any], by_itself: bool) -> None:
    """Tensors in dataclasses and objects of the program's were not found: a backward after the use met memory that was
    away, and a model in training mode that manages itself was offloaded before its backward.
    """

    class Doubled(nn.Module):
        """Computes with a parameter of its own, so that nothing inside is watched."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((8, 8), 2.0))

        def forward(self, x: torch.Tensor) -> Any:
            return wraps(x @ self.weight)

    model, x = Doubled(), torch.ones(2, 8, device="cuda").requires_grad_()
    if by_itself:
        sire.AutoManageHook.manage_module(model)
        found = model(x)
        assert sire.manage(model).user.locks == 1, "it is kept for backward"
    else:
        with sire.auto_manage(model):
            found = model(x)
    [hidden] = tensors_in(found)
    hidden.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 16.0))
    assert torch.equal(model.weight.grad, torch.full((8, 8), 2.0))
    assert not model.weight.is_cuda


def test_a_use_that_is_ended_by_hand_comes_back_too() -> None:
    model = Encoder()
    wrapper = sire.manage(model)
    with torch.no_grad():
        wrapper.load()
    wrapper.load()
    loss = model.encode(torch.ones(2, 8, device="cuda")).sum()
    for _ in range(2):
        wrapper.offload()
    assert not model.first._forward_hooks
    assert not model.first.weight.is_cuda
    loss.backward()
    assert model.first.weight.grad is not None
    with pytest.raises(sire.InvalidArgumentError, match="more often"):
        wrapper.offload()


def test_scripted_modules_inside_are_left_alone() -> None:
    """They take no hooks; what they are in is watched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = torch.jit.script(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), inside)
    with sire.auto_manage(model):
        loss = model(torch.ones(2, 8, device="cuda")).sum()
    loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    with sire.auto_manage(inside), torch.no_grad():
        assert inside(torch.ones(2, 8, device="cuda")).is_cuda
    with sire.auto_manage(inside):
        pass


def test_a_backward_brings_a_model_once() -> None:
    """However many of its modules it goes through; and once more when it goes through them again."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])
    with sire.auto_manage(model):
        loss = model(torch.ones(2, 8, device="cuda")).sum()
    for retain in (True, False):
        before = len(sire.events())
        loss.backward(retain_graph=retain)
        assert [each.kind for each in sire.events()[before:]] == ["load", "offload"]
    assert not _backward._watched_of(sire.manage(model).user).comes_back._passes


def test_a_backward_that_finds_no_room_can_be_repeated() -> None:
    model = Encoder()
    with sire.auto_manage(model):
        loss = model.encode(torch.ones(2, 8, device="cuda")).sum()
    sire.setup_default_pools(vram_limit=0)
    with pytest.raises(sire.OutOfMemoryError):
        loss.backward(retain_graph=True)
    sire.setup_default_pools(release="eager")
    loss.backward()
    assert model.first.weight.grad is not None


def test_hooks_are_there_as_long_as_somebody_uses_the_model() -> None:
    """Those of nested uses and of other threads are the same ones; a copy that is made inside is a plain model."""
    model = Encoder()

    def hooks() -> list[int]:
        return [len(each._forward_hooks) for each in model.modules()]

    with torch.no_grad(), sire.auto_manage(model):
        assert not any(hooks()), "no backward can come"
        with torch.enable_grad(), sire.auto_manage(model), sire.auto_manage(model):
            assert max(hooks()) == 1
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model.first))]  # noqa: S301
            assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    assert not any(hooks())
    before = len(sire.events())
    for each in copies:
        each(torch.ones(2, 8, device="cuda")).sum().backward()
    assert len(sire.events()) == before


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_modules_inside_are_not_broken_or_compiled_again(fullgraph: bool) -> None:
    if torch.__version__ < "2.15" and on_software_device():
        pytest.skip("before PyTorch 2.15 the compiler cannot trace some of the software device")
    torch.compiler.reset()
    model = Encoder()
    graphs: list[Any] = []

    def counted(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.second.compile(backend=counted, fullgraph=fullgraph)
    for number in range(3):
        with torch._dynamo.config.patch(error_on_recompile=number > 0), sire.auto_manage(model):
            found = model(torch.ones(2, 8, device="cuda"))
        found.sum().backward()
    assert len(graphs) == 1


class Big(nn.Module):
    """So many MiB, of which a backward needs some."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(mib * MIB // 4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight[:4]).sum()


def test_a_backward_does_not_wait_for_the_thread_that_called_it() -> None:
    """Autograd works in a thread of its own, which took the uses of the calling one for those of somebody who would end
    them: it waited ten minutes, for a thread that waited for it.
    """
    sire.setup_default_pools(vram_limit=6 * MIB)
    model, in_the_way = Big(4), Big(4)
    x = torch.ones(4, device="cuda", requires_grad=True)
    with sire.auto_manage(model):
        loss = model(x)
    before = sire.summary()["totals"].get("wait", 0)
    with (
        sire.auto_manage(in_the_way),
        pytest.raises(sire.OutOfMemoryError, match=r"Big-\d+ again, and the thread that called it"),
    ):
        loss.backward(retain_graph=True)
    assert sire.summary()["totals"].get("wait", 0) == before
    loss.backward()
    assert torch.equal(x.grad.cpu(), torch.ones(4))


def test_a_backward_waits_for_another_thread() -> None:
    sire.setup_default_pools(vram_limit=6 * MIB)
    model, in_the_way = Big(4), Big(4)
    x = torch.ones(4, device="cuda", requires_grad=True)
    with sire.auto_manage(model):
        loss = model(x)
    begun, go = threading.Event(), threading.Event()

    def other() -> None:
        with sire.auto_manage(in_the_way):
            begun.set()
            assert go.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(20)
    backward = threading.Thread(target=loss.backward)
    backward.start()
    until("it waits", lambda: bool(_manage._waiting))
    go.set()
    backward.join(20)
    thread.join()
    assert torch.equal(x.grad.cpu(), torch.ones(4))
    assert not _manage._waiting
