"""Managed models and what is at the edge of them: outputs in their own memory, tensors without elements or of inference
mode, wrapped weights, what is said twice, and uses that end while garbage is collected.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import managed
import pytest
import sire
import torch
from managed import layers
from measure import is_gone_at_once
from running import until
from sire.models import _collected
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As `managed.fresh`."""
    yield from managed.fresh()


class Places(nn.Module):
    """Looks things up in tables of its own."""

    def __init__(self, wraps: Callable[[Any], Any] = lambda found: found, trained: bool = False) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(32.0).reshape(8, 4))
        self.prompt = nn.Parameter(torch.ones(3), requires_grad=trained)
        self.wraps = wraps

    def forward(self, x: torch.Tensor) -> Any:
        return self.wraps([self.table[: x.shape[0]], self.prompt, x + 1])


class Found:
    """What PyTorch does not know as a container."""

    def __init__(self, found: list[Any]) -> None:
        self.found = found


def as_hook(model: nn.Module) -> Callable[..., Any]:
    sire.AutoManageHook.manage_module(model)
    return model


def by_hand(model: nn.Module) -> Callable[..., Any]:
    hook = sire.AutoManageHook.manage_module(model)

    def call(*args: Any) -> Any:
        moved, _ = hook.pre_forward(model, *args)
        return hook.post_forward(model, model.forward(*moved))

    return call


WAYS = {"hook": as_hook, "by hand": by_hand, "wrapper": sire.manage}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "wraps", [list, tuple, lambda found: {"a": [found]}, Found], ids=["list", "tuple", "deep", "own"]
)
def test_an_output_that_is_a_part_of_the_model_outlasts_the_use(way: str, wraps: Callable[[Any], Any]) -> None:
    """``return self.table[:n]`` pointed into memory that was given back: reading it was an illegal access."""
    model = Places(wraps)
    with torch.no_grad():
        output = WAYS[way](model)(torch.ones(2, 4))
    assert not model.table.is_cuda
    with sire.auto_manage(layers()):
        part, prompt, computed = sire._nested.tensors_in(output)
        assert part.is_cuda
        assert torch.equal(part.cpu(), torch.arange(8.0).reshape(2, 4))
        assert torch.equal(prompt.cpu(), torch.ones(3))
        assert torch.equal(computed.cpu(), torch.full((2, 4), 2.0))


def test_an_output_that_is_a_parameter_can_be_trained() -> None:
    model = Places(lambda found: found[1], trained=True)
    sire.AutoManageHook.manage_module(model)
    output = model(torch.ones(2, 4))
    assert output.is_cuda
    (output * 3).sum().backward()
    assert torch.equal(model.prompt.grad, torch.full((3,), 3.0))
    assert not model.prompt.is_cuda


class Empty(nn.Module):
    """With tensors that have no elements, as caches have at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.none = nn.Linear(4, 4), nn.Parameter(torch.empty(0, 4))
        self.register_buffer("cache", torch.empty(0, 4))
        self.register_buffer("rest", torch.empty(3, 4)[3:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.cache, self.rest, self.none, self.inner(x)])


@pytest.mark.parametrize("release", ["eager", "lazy"])
@pytest.mark.parametrize("before", ["cpu", "cuda"])
def test_tensors_without_elements_are_where_the_others_are(release: Any, before: str) -> None:
    """They stayed where they were, so that whatever they were used with was on another device."""
    sire.setup_default_pools(release=release)
    model = Empty().to(before)
    identities, expected = {id(each) for each in model.state_dict(keep_vars=True).values()}, copy.deepcopy(model).cuda()
    for _ in range(2):
        with sire.auto_manage(model):
            found = model(torch.ones(2, 4, device="cuda"))
            assert {each.device.type for each in model.state_dict().values()} == {"cuda"}
        assert {each.device.type for each in model.state_dict().values()} == {"cpu"}
        assert torch.equal(found, expected(torch.ones(2, 4, device="cuda")))
        found.sum().backward()
        assert {each.grad.device.type for each in model.parameters()} == {"cpu"}
    assert {id(each) for each in model.state_dict(keep_vars=True).values()} == identities
    model.half()
    with sire.auto_manage(model):
        assert {(each.device.type, each.dtype) for each in model.state_dict().values()} == {("cuda", torch.half)}


@pytest.mark.parametrize("release", ["eager", "lazy"])
def test_models_that_were_made_in_inference_mode_stay_what_they_are(release: Any) -> None:
    """They were refused with an `AttributeError`."""
    sire.setup_default_pools(release=release)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
        expected = model(torch.ones(2, 4))
    sire.manage(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode(), sire.auto_manage(model):
            found = model(torch.ones(2, 4, device="cuda")).cpu()
        assert torch.allclose(found, expected, atol=1e-5)
        assert {(each.device.type, each.is_inference()) for each in model.state_dict().values()} == {("cpu", True)}
    with torch.inference_mode(), sire.auto_manage(model):
        model[0].weight.fill_(2.0)
    assert torch.equal(model[0].weight, torch.full((4, 4), 2.0))


def test_wrapped_weights_are_not_converted_while_they_may_be_away() -> None:
    """``.half()`` read memory of weights that was away, an illegal access; some of the model was converted by then."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[1].weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)), requires_grad=False)
    with sire.auto_manage(model):
        pass
    for convert in (model.half, model[1].double, lambda: model.to("cuda", torch.bfloat16)):
        with pytest.raises(sire.UnsupportedError, match=r"weight is a TwoTensor, .*convert the module before"):
            convert()
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    model.float().to("cpu").cuda()
    model[0].half()
    with sire.auto_manage(model):
        assert model[0].weight.dtype == torch.half
        assert torch.equal(cast(Any, model[1].weight).a.cpu(), torch.ones(4, 4))


def test_what_cannot_be_changed_can_be_said_again() -> None:
    """``auto_manage(model, device="cuda:0")`` was refused the second time, although it changed nothing."""
    model = layers()
    said = {"device": "cuda:0", "mutable": True, "backup": "cpu", "tag": "said/twice", "mode": "view", "priority": 1}
    for _ in range(2):
        with sire.auto_manage(model, **said):
            assert model[0].weight.is_cuda
    for same in ({"device": 0}, {"device": torch.device("cuda")}, {"source": None}, {"tag": None, "device": None}):
        sire.manage(model, **same)
    for other in ({"device": "cpu"}, {"mutable": False}, {"backup": "disk"}, {"tag": "another"}, {"nobody": None}):
        with pytest.raises(sire.InvalidArgumentError, match=f"{next(iter(other))} cannot be changed"):
            sire.manage(model, **other)


def test_garbage_that_is_collected_waits_for_nobody() -> None:
    """A use that lasts as long as an output ended where the output was collected, which may be anywhere: a thread that
    held a lock of the program's waited there for another, which wanted that lock.
    """
    model = layers()
    user = sire.AutoManageHook.manage_module(model).am.user
    gc.collect()
    cycle: list[Any] = []
    cycle += [model(torch.ones(2, 32)), cycle]
    assert user.locks == 1
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with user._own:
            held.set()
            go.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    del cycle
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join(10)
    waited = collector.is_alive()
    go.set()
    holder.join()
    collector.join()
    assert not waited
    until("the use is over", lambda: user.locks == 0 and not user.loaded)


def test_whoever_calls_next_ends_what_was_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no thread for it, as in a process that may have no more."""
    model, other = layers(), layers()
    user = sire.AutoManageHook.manage_module(model).am.user
    cycle: list[Any] = []
    cycle += [model(torch.ones(2, 32)), cycle]
    kept: _collected.SimpleQueue[Any] = _collected.SimpleQueue()
    monkeypatch.setattr(_collected, "_waiting", kept)
    del cycle
    gc.collect()
    assert user.locks == 1
    with sire.auto_manage(other):
        assert user.locks == 0


def normalised() -> nn.Module:
    """PyTorch's old way: a graph holds the parameters as long as the module lives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(4, 4))


def wrapped() -> nn.Module:
    model = nn.Linear(4, 4).requires_grad_(False)
    model.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.full((4, 4), 2.0)), requires_grad=False)
    return nn.Sequential(model)


@pytest.mark.parametrize("make", [normalised, wrapped], ids=lambda each: each.__name__)
def test_the_state_of_a_model_in_paused_mode_can_be_saved_at_any_time(make: Callable[[], nn.Module]) -> None:
    """Saving it while it was offloaded was an illegal access: its tensors stay on the device, without their memory."""
    model = make()
    expected = copy.deepcopy(model.state_dict())
    sire.manage(model)
    for _ in range(2):
        with torch.no_grad(), sire.auto_manage(model):
            assert {each.device.type for each in model.state_dict().values()} == {"cuda"}
            for each in model.parameters():
                each.copy_(each * 2)
            expected = {name: each * 2 for name, each in expected.items()}
        assert "cuda" in {each.device.type for each in model.parameters()}, "some of it is in paused mode"
        torch.save(found := model.state_dict(), io.BytesIO())
        assert {each.device.type for each in found.values()} == {"cpu"}
        assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert uses_of(model) == 0
    sire.setup_default_pools(vram_limit=0)
    with pytest.raises(sire.OutOfMemoryError):
        model.state_dict()
    assert model.state_dict(keep_vars=True).keys() == expected.keys()
    sire.setup_default_pools(release="eager")
    with sire.auto_manage(model):
        copied = pickle.loads(pickle.dumps(model)) if make is wrapped else model  # noqa: S301
    sire.manage(model).user.close()
    assert not model._state_dict_hooks
    assert copied.state_dict().keys() == expected.keys()


def test_a_failed_prefetch_keeps_no_tensors_of_who_waits_for_it() -> None:
    """Its error and the frame that raised it held each other, and the variables of all callers."""
    model = sire.manage(nn.Linear(2048, 2048))
    full = torch.empty(torch.cuda.mem_get_info()[0] - (4 << 20), dtype=torch.uint8, device="cuda")

    def waits() -> weakref.ref[torch.Tensor]:
        own = torch.ones(4)
        with pytest.raises(sire.OutOfMemoryError):
            sire.prefetch(model).wait()
        return weakref.ref(own)

    assert is_gone_at_once(waits)
    del full


def test_a_model_comes_in_where_memory_is_only_cached_in_a_region() -> None:
    """Its pool emptied PyTorch's cache, which leaves pools of regions alone."""
    with sire.region("cached"):
        dead = torch.empty(torch.cuda.mem_get_info()[0] - (4 << 20), dtype=torch.uint8, device="cuda")
    del dead
    with sire.auto_manage(nn.Linear(2048, 2048)) as managed_model:
        assert managed_model.get_execution_device().type == "cuda"


def uses_of(model: nn.Module) -> int:
    return int(sire.manage(model).user.locks)
