"""Wrapped modules are still modules: they are saved, copied, pickled, called with what is lent to them, transformed,
parametrized and converted as plain ones are, wherever their unit is. Most of it needs no device.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sire
import torch
from sire._adopt import adopt
from sire._units.holding import is_hollow
from sire.memory import MemoryConfig, MemoryManager, ModuleWrapper
from torch import nn

# --- what is taken of them -----------------------------------------------------------------------------------------


def test_on_the_disk_a_model_is_still_the_model(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(3, 8)
    expected, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    manager = MemoryManager(MemoryConfig(disk_cache_dir=tmp_path))
    manager.wrap_model(model)

    def to_the_disk() -> None:
        assert all(manager.residency.demote(unit) for unit in manager.residency.listed())
        assert model[0].weight.shape == (8, 8)
        assert is_hollow(model[0].weight)

    to_the_disk()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    to_the_disk()
    assert torch.equal(copy.deepcopy(model)(x), expected)
    to_the_disk()
    loaded = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert torch.equal(loaded(x), expected)
    assert not isinstance(loaded[0], ModuleWrapper)
    to_the_disk()
    model.load_state_dict({name: value * 2 for name, value in state.items()})
    assert torch.equal(model[1].weight, state["1.weight"] * 2)
    to_the_disk()
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(x), expected)
    to_the_disk()
    manager.cleanup()
    assert torch.equal(model(x), expected)
    assert list(tmp_path.iterdir()) == []


TAKEN = {
    "state_dict": lambda module: module.state_dict()["weight"],
    "copied": lambda module: copy.deepcopy(module).weight,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)).weight,  # noqa: S301
}


@pytest.mark.parametrize("how", TAKEN)
def test_what_is_taken_while_others_send_it_to_the_disk_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Weights were NaN in a state dict, a copy or a pickle now and then, and nothing was raised: between the moment
    when they were brought from the disk and that when they were read, another thread could send them there again.
    """
    from sire._units import wrapping

    layer = nn.Linear(4, 4, bias=False)
    expected = layer.weight.detach().clone()
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(layer)
        (unit,) = manager.residency.listed()

        def bring(module: nn.Module) -> None:
            original(module)
            thread = threading.Thread(target=manager.residency.demote, args=(unit,))
            thread.start()
            thread.join()

        original = wrapping.bring_to_memory
        monkeypatch.setattr(wrapping, "bring_to_memory", bring)
        taken = TAKEN[how](layer)
        monkeypatch.undo()
        assert torch.equal(taken, expected)
        assert manager.residency.demote(unit)
        assert torch.equal(taken, expected)
        assert is_hollow(layer.weight)


def test_a_pickler_that_is_not_done_keeps_from_the_disk_what_it_reads(tmp_path: Path) -> None:
    layers = [nn.Linear(4, 4, bias=False) for _ in range(2)]
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        for each in layers:
            manager.wrap_module(each)
        parts = layers[0].__reduce_ex__(2)
        found = [manager.residency.demote(unit) for unit in manager.residency.listed()]
        assert found == [False, True]
        del parts
        assert manager.residency.demote(manager.residency.listed()[0])


# --- what is lent to them ------------------------------------------------------------------------------------------


def lent_to(module: nn.Module, as_parameters: bool) -> dict[str, torch.Tensor]:
    """Zeros for everything that a module has; buffers are ones."""
    made: dict[str, torch.Tensor] = {name: torch.zeros_like(each) for name, each in module.named_parameters()}
    if as_parameters:
        made = {name: nn.Parameter(each) for name, each in made.items()}
    return made | {name: torch.ones_like(each) for name, each in module.named_buffers()}


@pytest.mark.parametrize("parts", ["tensors", "parameters", "buffers", "some"])
def test_a_functional_call_leaves_tensors_to_those_who_lend_them(tmp_path: Path, parts: str) -> None:
    """`torch.func.functional_call` made the caller's own tensors the unit's: they went to the device and to the disk
    with it, and the caller read NaN.
    """
    module, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.ones(2, 4)
    expected = module(x)
    lent = lent_to(module, parts == "parameters")
    if parts in ("buffers", "some"):
        kept = {"buffers": "running", "some": "0.weight"}[parts]
        lent = {name: each for name, each in lent.items() if kept in name}
    twin = torch.func.functional_call(copy.deepcopy(module), lent, (x,))
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path, offload_1d_parameters=True)) as manager:
        manager.wrap_module(module)
        (unit,) = manager.residency.listed()
        before = list(unit.tensors)
        for _ in range(2):
            assert manager.residency.demote(unit)
            assert torch.equal(torch.func.functional_call(module, lent, (x,)), twin)
        assert all(one is other for one, other in zip(unit.tensors, before, strict=True))
        assert manager.residency.demote(unit)
        assert not any(each.isnan().any() for each in lent.values())
        assert torch.equal(module(x), expected)


def test_a_functional_call_with_weights_of_another_unit_brings_those(tmp_path: Path) -> None:
    student, teacher, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(1, 4)
    expected = teacher(x), student(x)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        for each in (student, teacher):
            manager.wrap_module(each)
        assert all(manager.residency.demote(unit) for unit in manager.residency.listed())
        found = torch.func.functional_call(student, dict(teacher.named_parameters()), (x,))
        assert torch.equal(found, expected[0])
        assert torch.equal(student(x), expected[1])


def test_what_is_assigned_for_good_is_the_units(tmp_path: Path) -> None:
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(layer)
        (unit,) = manager.residency.listed()
        layer.weight = nn.Parameter(torch.zeros(4, 4))
        assert torch.equal(layer(x), layer.bias[None])
        assert unit.tensors[0] is layer.weight


def test_a_replica_for_another_device_is_a_plain_module(tmp_path: Path) -> None:
    """As `torch.nn.DataParallel` makes it: it had the unit of the module that it was made of, and took its tensors."""
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(layer)
        (unit,) = manager.residency.listed()
        replica = layer._replicate_for_data_parallel()
        for name, each in layer.named_parameters():
            setattr(replica, name, each.detach().clone())
        assert torch.equal(replica(x), layer(x))
        assert type(replica) is nn.Linear
        assert unit.tensors[0] is layer.weight


def test_transforms_of_functions_run_over_wrapped_modules(tmp_path: Path) -> None:
    """``torch.func.grad`` and its like raised that they take no hooks for what is saved. Without hooks, a unit stays
    until no backward pass can be made any more.
    """
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.ones(4)
    twin = copy.deepcopy(module)

    def gradients(of: nn.Module) -> dict[str, torch.Tensor]:
        def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(of, weights, (x,)).pow(2).sum()

        found: dict[str, torch.Tensor] = torch.func.grad(loss)(dict(of.named_parameters()))
        return found

    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_model(module)
        units = manager.residency.listed()

        def demoted() -> list[bool]:
            return [manager.residency.demote(unit) for unit in units]

        for device in ("cpu", "cuda", "cpu"):
            at = x.to(device)
            for transform in (torch.func.jacrev, torch.func.jacfwd):
                demoted()
                assert torch.allclose(transform(module.to(device))(at), transform(twin.to(device))(at))
        demoted()
        expected = gradients(twin)
        for _ in range(2):
            assert all(torch.allclose(each, expected[name]) for name, each in gradients(module).items())
        assert demoted() == [True, True]
        output, backward = torch.func.vjp(module, x)
        assert demoted() == [False, False]
        assert torch.allclose(backward(torch.ones(4))[0], torch.func.vjp(twin, x)[1](torch.ones(4))[0])
        del output, backward
        assert demoted() == [True, True]


class Conjugated(nn.Module):
    """Reads its complex weight through views that change nothing in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conjugate = self.weight.conj()
        return (x @ conjugate @ self.weight.mT).abs().sum() + (x.abs() @ conjugate.imag @ self.weight.real).sum()


def test_gradients_of_weights_that_are_read_through_lazy_views() -> None:
    """The backward pass got the weight without its conjugation: the gradients were those of another function."""
    model, x = Conjugated(), torch.randn(2, 4, dtype=torch.complex64, requires_grad=True)
    inputs = (x, model.weight)
    expected = torch.autograd.grad(model(x), inputs)
    MemoryManager(MemoryConfig()).wrap_module(model)
    for found, wanted in zip(torch.autograd.grad(model(x), inputs), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("error:Dynamo does not know:UserWarning")
def test_compiling_a_model_with_wrapped_layers_warns_of_nothing(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(2, 4)
    expected = model(x)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_model(model)
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert torch.allclose(compiled(x), expected)
            compiled(x).sum().backward()


# --- what is saved for their backward passes -----------------------------------------------------------------------


class Tied(nn.Module):
    """It has a weight of its own, and reads one that another module has."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(4, 4))
        self.other = other.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.own @ self.own.t()).tanh() @ self.other


def test_a_module_saves_weights_of_all_its_units_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch asks the innermost hooks alone: what these did not know was saved as it was, and kept its memory."""
    from torch.multiprocessing.reductions import StorageWeakRef

    embedding, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4, requires_grad=True)
    tied = Tied(embedding)
    twin = copy.deepcopy(tied)
    twin(x).sum().backward()
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        for each in (embedding, tied):
            manager.wrap_module(each)
        monkeypatch.setattr(manager.residency, "left", manager.residency.demote)
        memory = [StorageWeakRef(each.untyped_storage()) for each in tied.parameters()]
        loss = tied(x).sum()
        assert [unit.tier for unit in manager.residency.listed()] == ["disk", "disk"]
        assert [each.expired() for each in memory] == [True, True]
        loss.backward()
        for unit in manager.residency.listed():
            unit.promote()
        for mine, other in zip(tied.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)


def test_a_wrapped_layer_keeps_to_the_hooks_around_it(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    packed: list[torch.Tensor] = []
    unpacked: list[int] = []

    def pack(saved: torch.Tensor) -> int:
        packed.append(saved.clone())
        return len(packed) - 1

    def unpack(number: int) -> torch.Tensor:
        unpacked.append(number)
        return packed[number]

    inputs = [x, model[0](x).detach()]
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_model(model)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = model(x).sum()
        assert len(packed) == 2, "the weights are the units'"
        assert all(torch.equal(one, other) for one, other in zip(packed, inputs, strict=True))
        loss.backward()
        assert sorted(unpacked) == [0, 1]
        assert torch.equal(model[1].weight.grad, inputs[1].sum(0).expand(4, 4))


def test_a_layer_on_the_disk_that_is_hung_into_an_adopted_module_is_refused_until_it_is_brought(tmp_path: Path) -> None:
    """What stands in for its weights was taken for the weights."""
    outer, layer = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    expected = layer.weight.detach().clone()
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(layer)
        assert manager.residency.demote(manager.residency.listed()[0])
        adopted = adopt(outer)
        outer.append(layer)
        with pytest.raises(sire.BusyError, match="is on the disk"):
            adopted.load()
        assert manager.residency.listed()[0].on_disk
        layer.load_all()
        adopted.load()
        assert torch.equal(layer.weight.detach().cpu(), expected)
        adopted.release()
        assert torch.equal(layer.weight.detach().cpu(), expected)


def test_a_checkpoint_around_wrapped_layers_computes_again(tmp_path: Path) -> None:
    """It was not told of what they saved, and so kept all of it and computed nothing again."""
    from torch.utils.checkpoint import checkpoint

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4, requires_grad=True)
    twin, calls = copy.deepcopy(model), []
    twin(x).pow(2).sum().backward()
    expected, x.grad = x.grad, None
    model[0].register_forward_pre_hook(lambda *_: calls.append("again"))
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(model)
        loss = checkpoint(model, x, use_reentrant=False).pow(2).sum()
        assert all(manager.residency.demote(unit) for unit in manager.residency.listed())
        loss.backward()
        assert calls == ["again"] * 2
        assert torch.equal(x.grad, expected)
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)


# --- classes of their own ------------------------------------------------------------------------------------------


class Locking(nn.Linear):
    """It says itself what of it is kept, and has a list with itself in it."""

    ended: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.guard, self.around = threading.Lock(), [self]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "guard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.guard = threading.Lock()

    def __del__(self) -> None:
        Locking.ended.append(self.__dict__.get("guard"))


class Copying(nn.Linear):
    """It copies itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copying:
        made = type(self)(4, 4)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


OF_THEIR_OWN = {
    "locking": Locking,
    "copying": lambda: Copying(4, 4),
    "lstm": lambda: nn.LSTM(4, 4),
    "graph": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))),
    "parametrized": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}


def answer_of(module: nn.Module) -> torch.Tensor:
    found = module(torch.ones(1, 4))
    return found if isinstance(found, torch.Tensor) else found[0]


def pickled(module: nn.Module) -> nn.Module:
    made: nn.Module = pickle.loads(pickle.dumps(module))  # noqa: S301
    return made


# Of a parametrized module PyTorch allows deep copies alone.
WAYS = [
    (kind, how)
    for kind in OF_THEIR_OWN
    for how in (copy.deepcopy, pickled, copy.copy)
    if kind != "parametrized" or how is copy.deepcopy
]


@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_a_module_that_says_how_it_is_copied_is_copied_so(
    tmp_path: Path, kind: str, how: Callable[[nn.Module], nn.Module]
) -> None:
    """Copies and pickles of a wrapped module were made of its attributes, whatever its class does: a lock was an error,
    an LSTM could not be pickled, and copies of a graph module were wrapped by halves.
    """
    module = OF_THEIR_OWN[kind]()
    own, expected = type(module), answer_of(module)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(module)
        assert manager.residency.demote(manager.residency.listed()[0])
        made = how(module)
        assert kind != "locking" or module.guard not in Locking.ended
        assert not is_hollow(next(made.parameters()))
        assert not isinstance(made, ModuleWrapper)
        assert type(made) is own or kind in ("graph", "parametrized"), "those have a class for each object"
        assert torch.equal(answer_of(made), expected)
        if how is not copy.copy:
            with torch.no_grad():
                for each in made.parameters():
                    each.zero_()
            assert not torch.equal(answer_of(made), expected)
            assert torch.equal(answer_of(module), expected)
        if kind == "locking" and how is copy.deepcopy:
            assert made.around == [made]
        made.state_dict()
    assert type(module).__mro__[1:] == own.__mro__[1:]
    assert type(module) is own or kind == "parametrized"


@pytest.mark.parametrize("how", ["first", "then", "both"])
def test_a_layer_is_parametrized_before_and_after_it_is_wrapped(tmp_path: Path, how: str) -> None:
    """PyTorch puts a class of its own above a module's to parametrize it, and the manager did, too: whoever came first
    was lost when the other one went, and with it the weight or the class.
    """
    from torch.nn.utils import parametrizations, parametrize

    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    expected = layer(x)
    if how != "then":
        parametrizations.weight_norm(layer)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(layer)
        if how == "then":
            parametrizations.weight_norm(layer)
        elif how == "both":
            parametrize.register_parametrization(layer, "bias", nn.Identity())
        for module in (layer, copy.deepcopy(layer)):
            assert torch.allclose(module(x), expected)
            assert isinstance(module, ModuleWrapper) is (module is layer)
        assert manager.residency.demote(manager.residency.listed()[0])
        again = copy.deepcopy(copy.deepcopy(layer))
        assert torch.allclose(again(x), expected)
        parametrize.remove_parametrizations(again, "weight")
        assert torch.allclose(again(x), expected)
        if how == "both":
            parametrize.remove_parametrizations(layer, "bias")
        manager.cleanup()
        assert parametrize.is_parametrized(layer, "weight")
        manager.wrap_module(layer)
        assert torch.allclose(layer(x), expected)
        parametrize.remove_parametrizations(layer, "weight")
        assert torch.allclose(layer(x), expected)
        assert isinstance(layer, ModuleWrapper)
        assert manager.residency.demote(manager.residency.listed()[0])
        assert torch.allclose(layer(x), expected)
    assert type(layer) is nn.Linear


# --- conversions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("send", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.half, torch.double])
def test_a_weight_that_a_module_has_twice_is_converted_once(send: str, dtype: torch.dtype) -> None:
    """``.half()`` raised KeyError for one module with a tied embedding and head: PyTorch visits the weight in both, and
    the second time it was half already.
    """
    tied = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    tied["embedding"].weight.grad = torch.ones(8, 4)
    expected = tied["head"].weight.detach().to(dtype)
    with MemoryManager() as manager:
        manager.wrap_module(tied)
        for convert in (lambda: tied.to(send), lambda: tied.to(dtype), tied.double):
            convert()
        assert tied["head"].weight is tied["embedding"].weight
        tied.to(dtype)
        assert torch.equal(tied["head"].weight, expected)
        assert tied["head"].weight.grad.dtype == dtype
        tied.half()


@pytest.mark.parametrize("tier", ["disk", "cpu", "gpu"])
def test_a_conversion_brings_weights_that_another_module_has_too(tmp_path: Path, tier: str) -> None:
    """A weight was lost when a module was converted that shares it with one whose unit was on the disk: what stands in
    for its content was converted, and the file removed.
    """
    one, other = nn.Linear(8, 8, bias=False), nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    other[0].weight = other[1].weight = one.weight
    one.weight.grad = torch.ones(8, 8)
    expected, x = one.weight.detach().double(), torch.ones(1, 8, dtype=torch.double)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(one)
        manager.wrap_module(other)
        device = "cuda" if tier == "gpu" else "cpu"
        one.to(device)
        other.to(device)
        if tier == "gpu":
            one.load_all()
        elif tier == "disk":
            assert manager.residency.demote(manager.residency.listed()[0])
        other.double()
        assert other[0].weight is one.weight
        assert torch.equal(one.weight.cpu(), expected)
        assert torch.equal(one.weight.grad.cpu(), torch.ones(8, 8, dtype=torch.double))
        assert torch.allclose(one(x.to(device)).cpu(), x @ expected.t())
        assert other(x.to(device)).dtype == torch.double
        assert one.weight.device.type == device


def test_a_module_that_has_nothing_of_its_own_is_converted_too() -> None:
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    other.weight = one.weight
    with MemoryManager() as manager:
        manager.wrap_module(one)
        manager.wrap_module(other)
        other.half()
        assert one.weight.dtype == torch.half


def test_a_weight_in_use_elsewhere_is_not_converted() -> None:
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    other.weight = one.weight
    with MemoryManager() as manager:
        manager.wrap_module(one)
        manager.wrap_module(other)
        one.cuda()
        with (
            manager.residency.lease(manager.residency.listed()[0]),
            pytest.raises(sire.BusyError, match="cannot be offloaded now: it is in use"),
        ):
            other.half()
        assert {each.dtype for each in (*one.parameters(), *other.parameters())} == {torch.float}
        other.half()
        assert {each.dtype for each in (*one.parameters(), *other.parameters())} == {torch.half}


def test_modules_that_share_weights_are_converted_by_two_threads() -> None:
    """Each needs the other's unit; units inside another's module are locked with it, so that nobody waits for ever."""
    inner = nn.Linear(4, 4, bias=False)
    outer = nn.Sequential(inner, nn.Linear(4, 4, bias=False))
    with MemoryManager() as manager:
        for each in (outer, inner):
            manager.wrap_module(each)

        def convert(module: nn.Module) -> None:
            for _ in range(50):
                module.half()
                module.float()

        threads = [threading.Thread(target=convert, args=(each,), daemon=True) for each in (outer, inner) * 2]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
        assert not any(each.is_alive() for each in threads)


class Language(nn.Module):
    """A head that has its embedding's weight, as most language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(self.embedding(tokens)))
        return out


@pytest.mark.parametrize("aggressive", [False, True])
@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_an_embedding_comes_with_the_head_that_it_is_tied_to(tmp_path: Path, tier: str, aggressive: bool) -> None:
    """A language model could not be called: its head is a layer to be wrapped, and its embedding met their weight in
    host memory. In the backward pass each of the two added to a gradient that had gone with the weight.
    """
    model, tokens = Language(), torch.arange(6)
    twin = copy.deepcopy(model)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path, aggressive_post_forward_offload=aggressive)) as manager:
        manager.wrap_model(model)
        assert isinstance(model.embedding, ModuleWrapper)
        model.to("cuda")
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
        for _ in range(3):
            for unit in manager.residency.listed():
                {"gpu": lambda _: None, "cpu": manager.residency.offload, "disk": manager.residency.demote}[tier](unit)
            losses = model(tokens.cuda()).square().mean(), twin(tokens).square().mean()
            assert torch.allclose(losses[0].cpu(), losses[1])
            for optimizer, loss in zip(optimizers, losses, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        state = model.state_dict()
        assert model.head.weight is model.embedding.weight
        assert all(torch.allclose(state[name].cpu(), value, atol=1e-6) for name, value in twin.state_dict().items())
    assert type(model.embedding) is nn.Embedding


def test_a_module_that_has_wrapped_layers_in_it_is_no_layer() -> None:
    """It may hold their weights under names of its own; it is called with all that is in it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_parameter("first", model[0].weight)
    with MemoryManager() as manager:
        manager.wrap_model(model)
        assert not isinstance(model, ModuleWrapper)
        assert [isinstance(layer, ModuleWrapper) for layer in model] == [True, True]
