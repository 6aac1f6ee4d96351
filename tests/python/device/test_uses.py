"""Uses of managed models that end otherwise than by returning, or that other libraries begin and end by hand."""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import managed
import pytest
import sire
import torch
from managed import layers, plainly
from running import until
from sire import models
from sire._adopt import adopted_by
from sire.memory import MemoryConfig, MemoryManager
from sire.models import _events, _manage
from sire.models.commits import InferenceOptimizerHook
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As `managed.fresh`."""
    yield from managed.fresh()


@pytest.mark.parametrize("again", [False, True])
def test_what_is_hung_in_may_need_a_region_of_its_own(again: bool) -> None:
    """A load that opened it ended a lease that the new region did not have, and raised."""
    model = layers().requires_grad_(False)
    with sire.auto_manage(model):
        pass
    halves = TwoTensor(torch.ones(64, 32), torch.ones(64, 32))
    with sire.auto_manage(model) if again else contextlib.nullcontext():
        model[0].weight = nn.Parameter(halves, requires_grad=False)  # as quantization does
        for _ in range(2):
            with sire.auto_manage(model):
                assert {each.device.type for each in model.parameters()} == {"cuda"}
    adopted = adopted_by(model)
    assert adopted is not None
    assert len(adopted.regions) == 2
    assert not adopted.loaded


class Around(nn.Module):
    """A model with another one inside, and something that is done in the middle of its forward."""

    def __init__(self, does: Callable[[Any], object], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.inner, self.does = nn.Parameter(torch.ones(32)), inner or nn.Linear(32, 32), does

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.inner(x)
        self.does(self)
        return found * self.weight


def divide(_gradient: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize("training", [True, False], ids=["kept", "brought back"])
def test_a_backward_that_raises_ends_the_use(training: bool) -> None:
    model = layers().train(training)
    hook = sire.AutoManageHook.manage_module(model)
    model[0].weight.register_hook(divide)
    loss = plainly(model, torch.randn(4, 32))
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    # Autograd's thread drops what it was to call.
    until("the use is over", lambda: hook.am.user.locks == 0)
    until("nobody holds anything", lambda: not _manage._holders)
    assert not model[0].weight.is_cuda


class Interrupted(nn.Module):
    """Ends as Ctrl-C ends it, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.raises: type[BaseException] | None = KeyboardInterrupt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises is not None:
            raise self.raises
        return self.inner(x)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_what_ctrl_c_ends_keeps_no_room(ends: type[BaseException]) -> None:
    model, other = Interrupted(), layers()
    model.raises = ends
    hook = sire.AutoManageHook.manage_module(model)
    with pytest.raises(ends):
        model(torch.ones(1, 32))
    with sire.auto_manage(other):
        assert hook.am.user.locks == 0, "whoever comes next finds out"
        assert not model.inner.weight.is_cuda
    model.raises = None
    with torch.no_grad():
        assert model(torch.ones(1, 32)).is_cuda


def test_what_ctrl_c_ends_inside_another_module_ends_with_that() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.ones(32)), Interrupted()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(KeyboardInterrupt):
                self.inner(x)
            assert outer.am.user.locks == 1, "it is under way"
            return x * self.weight

    model = Outer().eval()
    inner = sire.AutoManageHook.manage_module(model.inner)
    outer = sire.AutoManageHook.manage_module(model)
    with torch.no_grad():
        assert model(torch.ones(1, 32)).is_cuda
    assert inner.am.user.locks == outer.am.user.locks == 0


def test_what_ctrl_c_ends_inside_a_module_that_nobody_manages_is_found_at_its_next_call() -> None:
    model = nn.Sequential(layers(), Interrupted()).eval()
    first, second = (sire.AutoManageHook.manage_module(each) for each in model)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(torch.ones(1, 32))
        assert second.am.user.locks == 1, "of this call; that of the one before has ended"
    model[1].raises = None
    with torch.no_grad():
        model(torch.ones(1, 32))
    assert first.am.user.locks == second.am.user.locks == 0


def uses_another(model: Any) -> None:
    """In the middle of a forward, outside of any other's."""
    with sire.auto_manage(layers()):
        sire.models.evict()
        assert model.weight.is_cuda


def test_a_use_by_hand_lasts_until_it_is_ended_by_hand() -> None:
    model = Around(uses_another).eval()
    inner, hook = sire.AutoManageHook.manage_module(model.inner), sire.AutoManageHook.manage_module(model)
    with torch.no_grad():
        args, kwargs = hook.pre_forward(model, torch.ones(1, 32))
        assert hook.post_forward(model, model.forward(*args, **kwargs)).is_cuda
    assert inner.am.user.locks == hook.am.user.locks == 0


@pytest.mark.parametrize("is_paired", [True, False])
def test_a_forward_may_use_its_own_model_by_hand(is_paired: bool) -> None:
    """As the forward of a diffusers VAE calls its ``encode``."""

    def by_hand(model: Any) -> None:
        hook.pre_forward(model)
        if is_paired:
            hook.post_forward(model, None)
        assert hook.am.user.locks == 1 + (not is_paired)

    model = Around(by_hand).eval()
    hook = sire.AutoManageHook.manage_module(model)
    hook.is_paired = is_paired
    with torch.no_grad():
        for _ in range(2):
            assert model(torch.ones(1, 32)).is_cuda
            assert hook.am.user.locks == 0
            assert not model.weight.is_cuda


def test_a_use_that_nobody_will_end_is_over_when_the_next_begins() -> None:
    """As diffusers uses a VAE's ``decode``."""
    vae, other = layers().eval(), layers().eval()
    hook, next_hook = sire.AutoManageHook.manage_module(vae), sire.AutoManageHook.manage_module(other)
    hook.is_paired = False
    with torch.no_grad():
        for _ in range(2):
            args, _ = hook.pre_forward(vae, torch.ones(1, 32))
            assert vae[0].forward(*args).is_cuda
            assert hook.am.user.locks == 1
        other(torch.ones(1, 32))
        assert hook.am.user.locks == next_hook.am.user.locks == 0
        hook.pre_forward(vae)
        sire.models.evict()
    assert hook.am.user.locks == 0
    assert not vae[0].weight.is_cuda


def test_uses_by_hand_may_overlap_and_fail() -> None:
    first, second = layers().eval(), layers().eval()
    one, other = sire.AutoManageHook.manage_module(first), sire.AutoManageHook.manage_module(second)
    one.pre_forward(first)
    other.pre_forward(second)
    one.post_forward(first, None)
    assert second[0].weight.is_cuda, "it is still in use"
    other.post_forward(second, None)
    assert one.am.user.locks == other.am.user.locks == 0
    sire.setup_default_pools(vram_limit=0)
    with pytest.raises(sire.OutOfMemoryError):
        one.pre_forward(first)
    assert not models._under_way._calls()


def test_one_offload_too_many_ends_nobody_elses_use() -> None:
    """A use of one model was under way when another one was offloaded once too often: the thread then counted as one
    without uses, was taken to be at a safe point, and a pause from outside took the memory that it was using.
    """
    used, other = sire.manage(layers()), sire.manage(layers())
    with sire.control.open():
        used.load()
        with pytest.raises(sire.InvalidArgumentError, match="more often"):
            other.offload()
        assert sire.control._uses == {threading.get_ident(): 1}
        used.offload()
        assert not sire.control._uses


def test_a_use_that_another_thread_ends_is_over() -> None:
    """One thread loads, another offloads: the first was taken to hold something for ever, so that whoever found no
    room waited for it as long as waits last, instead of being told.
    """
    model, mine = sire.manage(layers()), sire.manage(layers())
    go, done = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (model.load(), done.set(), go.wait(20)))
    other.start()
    assert done.wait(20)
    with sire.auto_manage(mine):
        model.offload()
        assert list(_manage._holders) == [threading.get_ident()], "whoever ends it holds something else"
    assert not _manage._holders
    go.set()
    other.join()


def test_what_goes_away_while_events_are_read_is_noted() -> None:
    """A use ends with the outputs that it lasts for, and those may go in the middle of any call of the same thread:
    the reader of the events waited for itself, for ever.
    """
    log = _events.Log()

    class Going(collections.deque[Any]):
        def __iter__(self) -> Iterator[Any]:
            log.add("offload", "what went away")
            return super().__iter__()

    log._events = Going()
    reader = threading.Thread(target=log.events, daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive(), "it waits for itself"
    assert log.totals() == {"offload": 1, "bytes_copied": 0}


def test_a_with_block_that_another_thread_ends_is_over() -> None:
    """As that of a generator that a pool of threads drives: it was refused in the other thread, and never ended."""
    model, went_on = layers(), threading.Event()

    def stream() -> Iterator[int]:
        with sire.auto_manage(model):
            yield 1
            yield 2

    def begin() -> None:
        next(driven)
        begun.set()
        assert went_on.wait(20)

    driven, begun = stream(), threading.Event()
    other = threading.Thread(target=begin)
    other.start()
    assert begun.wait(20)
    user = sire.manage(model).user
    with sire.auto_manage(layers()):
        assert list(driven) == [2]
        assert user.locks == 0
        assert list(_manage._holders) == [threading.get_ident()], "the use that is over was the other thread's"
    assert not model[0].weight.is_cuda
    assert not model._forward_hooks
    went_on.set()
    other.join()


def test_a_with_block_of_several_threads_ends_each_ones_own_use() -> None:
    model = layers()
    block, both = sire.auto_manage(model), threading.Barrier(2, timeout=20)

    def other() -> None:
        with block:
            both.wait()
            both.wait()

    thread = threading.Thread(target=other)
    with block:
        thread.start()
        both.wait()
    assert list(_manage._holders) == [thread.ident]
    both.wait()
    thread.join()
    with pytest.raises(sire.InvalidArgumentError, match="more often"):
        block.__exit__(None, None, None)


@pytest.mark.parametrize("who", ["evict", "pool"])
def test_a_use_that_begins_while_another_thread_evicts_has_its_model(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked whether anybody uses it, and then it was asked to go: a use that began in between lost it."""
    sire.setup_default_pools(release="lazy")
    model = layers()
    user = sire.manage(model).user
    with sire.auto_manage(model):
        pass
    asked, begun, go = threading.Event(), threading.Event(), user.on_resource_request

    def slowly(device: Any, size: int) -> None:
        asked.set()
        begun.wait(0.5)
        go(device, size)

    monkeypatch.setattr(user, "on_resource_request", slowly)
    pool = models.get_resource_management().get_resource_pool(user.get_runtime_device())
    assert pool is not None
    other = threading.Thread(target=sire.evict if who == "evict" else lambda: pool._ask(user, 1))
    other.start()
    assert asked.wait(20)
    with sire.auto_manage(model):
        begun.set()
        other.join()
        assert model[0].weight.is_cuda
    assert len([each for each in sire.events() if each.kind == "evict" and each.name == user.name]) == 1


def test_a_thread_that_is_gone_keeps_no_room() -> None:
    model = Interrupted()
    hook = sire.AutoManageHook.manage_module(model)

    def work() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            model(torch.ones(1, 32))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    until("the use is over", lambda: hook.am.user.locks == 0)


def compiled(model: nn.Module) -> nn.Module:
    """Compiled in place: its calls are compiled ones from then on."""
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "way",
    [lambda model: model, compiled, lambda model: torch.compile(lambda x: model(x), backend="eager")],
    ids=["plain", "compiled", "compiled around"],
)
def test_a_use_that_is_under_way_is_not_taken_for_one_that_ended(way: Callable[[nn.Module], Any]) -> None:
    torch.compiler.reset()
    # Only hooks are kept out of compiled code by themselves.
    model = Around(torch.compiler.disable(uses_another)).eval()
    inner, outer = sire.AutoManageHook.manage_module(model.inner), sire.AutoManageHook.manage_module(model)
    called = way(model)
    with torch.no_grad(), warnings.catch_warnings():
        # The compiler warns of what it cannot trace; before PyTorch 2.15 that is some of the software device.
        warnings.simplefilter("error" if torch.__version__ >= "2.15" else "ignore", UserWarning)
        for _ in range(2):
            assert called(torch.ones(1, 32)).is_cuda
            assert inner.am.user.locks == outer.am.user.locks == 0


def test_a_copy_of_a_module_that_manages_itself_is_a_plain_one() -> None:
    model = layers().eval()
    sire.AutoManageHook.manage_module(model)
    with torch.no_grad():
        expected = model(torch.ones(1, 32)).cpu()
        loaded = pickle.loads(pickle.dumps(model))  # noqa: S301
        for copied in (copy.deepcopy(model), loaded):
            found = copied(torch.ones(1, 32))
            assert not found.is_cuda
            assert torch.allclose(found, expected, atol=1e-5)
        assert model(torch.ones(1, 32)).is_cuda


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_that_is_made_inside_a_use_is_a_plain_one(way: str) -> None:
    """A function without a name among the model's hooks could not be written, and a backward of the copy loaded the
    model that it was copied from.
    """
    model = layers()
    with sire.auto_manage(model):
        if way == "save":
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        else:
            copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301
        expected = model[0].weight.detach().cpu()
    before = len(sire.events())
    plainly(copied, torch.ones(4, 32, device=copied[0].weight.device)).backward()
    assert [each.kind for each in sire.events()[before:]] == []
    assert torch.equal(copied[0].weight.detach().cpu(), expected)
    assert copied[0].weight.grad is not None


# --- managed models whose layers are units of `sire.memory` --------------------------------------------------------


@pytest.mark.parametrize("policy", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["managed", "attached"])
def test_layers_of_a_managed_model_keep_their_weights(first: str, policy: Literal["cpu", "disk"]) -> None:
    """What stands in for weights on the disk was taken for the weights when the model was loaded: NaN for good."""
    model, x = layers().eval(), torch.randn(4, 32)
    expected, hook = model(x).detach(), InferenceOptimizerHook(default_offload_policy=policy)
    if first == "managed":
        wrapper = sire.manage(model)
        hook.attach(model)
    else:
        hook.attach(model)
        assert hook.manager is not None
        assert {each.on_disk for each in hook.manager.residency.listed()} == {policy == "disk"}
        wrapper = sire.manage(model)
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(wrapper(x).cpu(), expected, atol=1e-5)
    hook.detach()
    with torch.no_grad():
        assert torch.allclose(model(x.to(model[0].weight.device)).cpu(), expected, atol=1e-5)


def test_a_layer_that_is_pinned_makes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counted as one that has gone, although it stayed: whoever needed room asked it again and again, for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    asked: list[str] = []
    full = MemoryConfig(gpu_reload_threshold=1e-6, gpu_offload_threshold=2e-6, gpu_emergency_threshold=3e-6)
    with torch.no_grad(), MemoryManager(full) as manager:
        manager.set_auto_management(False)
        evict = manager.residency.evict

        def counted(unit: Any, after: Any = None) -> bool:
            asked.append(unit.name)
            assert len(asked) < 20, "for ever"
            return evict(unit, after)

        monkeypatch.setattr(manager.residency, "evict", counted)
        x = torch.randn(4, 256)
        expected = model(x)
        manager.wrap_model(model)
        model.to("cuda")
        sire.pin(model[0])
        for _ in range(2):
            assert torch.allclose(model(x.cuda()).cpu(), expected, atol=1e-5)
        assert "0" in asked
        assert model[0].weight.is_cuda
        adopted_by(model[0]).release()
        assert manager.residency.evict(manager.residency.units["0"]), "nobody has adopted it any more"
        assert not model[0].weight.is_cuda
