"""Layers that come by plan: a layer runs while later ones are on their way, and those that are done make way for them.

The device has 64 MiB (test_device_modes.py says so). `Gate` holds the stream on which layers arrive, so that what is on
its way stays on its way until the test has seen what goes on meanwhile: nothing here depends on time.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from measure import device_used
from sire._adopt import adopt
from sire._arrivals import Arrival, copy_stream
from sire._packed import HostBlock
from sire._pieces import Block
from sire._units.holding import Holding
from sire._units.residency import Residency
from sire._units.unit import Unit
from sire.models.commits import InferenceOptimizerHook
from torch import nn

MIB = 1 << 20
WIDTH = 1024
PATIENCE = 120.0


class Gate:
    """Holds the stream on which layers arrive: `close` before copies are begun, `open` lets those behind it pass."""

    def __init__(self) -> None:
        self._closed: list[tuple[threading.Event, Any]] = []
        self._kept: list[Any] = []
        self.lapsed = False
        self._runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")

    def close(self) -> None:
        """What the stream is given from now on waits."""
        event = threading.Event()

        def hold(_: Any) -> None:
            self.lapsed = self.lapsed or not event.wait(PATIENCE)

        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(hold)
        self._kept.append(function)
        stream = ctypes.c_void_p(copy_stream(torch, 0).cuda_stream)
        assert self._runtime.cudaLaunchHostFunc(stream, function, None) == 0
        self._closed.append((event, function))

    def open(self) -> None:
        """The oldest one that is closed lets pass what waits behind it."""
        self._closed.pop(0)[0].set()

    def open_all(self) -> None:
        """Nothing waits any more."""
        while self._closed:
            self.open()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open_all()
    torch.cuda.synchronize()
    assert not made.lapsed, "somebody waited for what was on its way"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leaves nothing on the device. What was paused must not be resumed all at once: it would not fit."""
    yield
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def stack(layers: int) -> nn.Sequential:
    """4 MiB of weights for each layer, in order."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]).eval()


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the bit on the software device; a GPU sums in another order."""
    exact = "software" in torch.cuda.get_device_name()
    return torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


def arrived(hook: InferenceOptimizerHook, number: int) -> bool:
    """Whether the device has the bytes of a layer, or whoever asks for it has to wait."""
    assert hook.manager is not None
    unit = hook.manager.residency.units[str(number)]
    return unit.ready


@pytest.mark.parametrize("room", [32, 3], ids=["everything-fits", "room-for-three"])
def test_a_layer_runs_before_the_next_one_has_arrived(gate: Gate, room: int) -> None:
    """Also where the one before has to go for it: that waits for its own last use, and not for what arrives."""
    count = 8
    model, x = stack(count), torch.randn(2, WIDTH)
    hook = InferenceOptimizerHook(num_prefetch_streams=1, max_memory_gb=room * 5 / 1024)
    with torch.no_grad():
        expected = model(x)
        hook.attach(model)
        model.to("cuda")
        assert same(model(x.cuda()).cpu(), expected), "the profile"
        assert hook.plan is not None
        assert hook.plan.order == [str(number) for number in range(count)]
        assert hook.manager is not None
        residency = hook.manager.residency
        residency.settle()
        hook.manager.offload_all_modules()
        ran: list[tuple[int, bool]] = []

        def after(number: int) -> Any:
            def look(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
                torch.cuda.current_stream().synchronize()
                assert bool(output.isfinite().all())
                residency.settle()
                ran.append((number, arrived(hook, number + 1)))
                unit = residency.units[str(number + 1)]
                assert unit.arriving, "the next one is on its way"
                gate.close()
                gate.open()

            return look

        handles = [model[number].register_forward_hook(after(number)) for number in range(count - 1)]
        gate.close()
        assert same(model(x.cuda()).cpu(), expected)
        gate.open_all()
        for each in handles:
            each.remove()
        assert ran == [(number, False) for number in range(count - 1)]
        told = [(event.what, event.unit) for event in residency.events() if event.what in ("prefetch", "arrive")]
        by_plan = [(what, str(number)) for number in range(1, count) for what in ("prefetch", "arrive")]
        assert [each for each in told if each[1] != "0"] == by_plan
        hook.detach()
        assert same(model(x.to(model[0].weight.device)).cpu(), expected)


def test_a_model_larger_than_the_device_stays_within_its_budget() -> None:
    """By the device's own census, after each layer and while it runs."""
    count, budget = 32, 24 * MIB
    model, x = stack(count), torch.randn(2, WIDTH)
    if sum(each.nbytes for each in model.parameters()) < 2 * torch.cuda.mem_get_info()[1]:
        pytest.skip("the device is not small enough for this test")
    with torch.no_grad():
        expected = model(x)
        hook = InferenceOptimizerHook(num_prefetch_streams=2, max_memory_gb=budget / (1 << 30))
        hook.attach(model)
        model.to("cuda")
        base, peak = device_used(), 0

        def look(_module: Any, _inputs: Any, _output: Any = None) -> None:
            nonlocal peak
            total = torch.cuda.mem_get_info()
            peak = max(peak, total[1] - total[0] - base)

        handles = [each.register_forward_hook(look) for each in model]
        handles += [each.register_forward_pre_hook(look) for each in model]
        for _ in range(3):
            assert same(model(x.cuda()).cpu(), expected)
        for each in handles:
            each.remove()
        assert 0 < peak <= budget + 2 * MIB, "and PyTorch's own segment for what the layers compute"
        assert hook.manager is not None
        summary = hook.manager.get_memory_summary()["system"]
        assert summary["total_prefetches"] >= count
        assert summary["total_offloads"] >= 2 * count
        hook.detach()


def test_what_is_written_while_a_layer_is_on_its_way_is_what_arrives(gate: Gate) -> None:
    model, x = stack(2), torch.randn(2, WIDTH)
    hook = InferenceOptimizerHook()
    with torch.no_grad():
        hook.attach(model)
        model.to("cuda")
        model(x.cuda())
        assert hook.manager is not None
        hook.manager.offload_all_modules()
        residency = hook.manager.residency
        unit = residency.units["1"]
        gate.close()
        assert residency.prefetch(unit).result(PATIENCE)
        assert unit.arriving
        assert model[1].weight.device.type == "cpu", "until it has arrived, it shows the host"
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model[1].weight.mul_(2.0)
        gate.open()
        expected = nn.functional.linear(nn.functional.linear(x, state["0.weight"]), 2.0 * state["1.weight"])
        assert same(model(x.cuda()).cpu(), expected)
        # Given up on its way, it loses nothing either.
        hook.manager.offload_all_modules()
        assert residency.prefetch(unit).result(PATIENCE)
        assert unit.arriving
        residency.offload(unit)
        assert not unit.arriving
        assert torch.equal(model[1].weight, 2.0 * state["1.weight"])
        hook.detach()


@contextmanager
def one_on_its_way(gate: Gate, model: nn.Sequential) -> Iterator[tuple[Residency, Unit]]:
    """The only layer of a model is on its way, behind the gate."""
    hook = InferenceOptimizerHook(num_prefetch_streams=0)
    hook.attach(model)
    model.to("cuda")
    assert hook.manager is not None
    residency = hook.manager.residency
    unit = residency.units["0"]
    gate.close()
    assert residency.prefetch(unit).result(PATIENCE)
    yield residency, unit
    hook.detach()


def test_another_stream_sees_what_one_has_waited_for(gate: Gate) -> None:
    model, x = stack(1), torch.randn(2, WIDTH)
    given = x.cuda()
    with torch.no_grad():
        expected = model(x)
    with torch.no_grad(), one_on_its_way(gate, model) as (residency, unit):
        first, second, seen = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
        for each in (first, second):
            each.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(first):
            residency.acquire(unit)  # its stream waits, its thread does not
        with torch.cuda.stream(second), residency.lease(unit):
            seen.record()
        assert not seen.query(), "the second stream waits, too"
        gate.open()
        residency.release(unit, threading.get_ident())
        with torch.cuda.stream(second):
            assert same(model(given).cpu(), expected)


def unmapped(block: HostBlock) -> list[str]:
    """Gets an entry when the block's memory goes."""
    told: list[str] = []
    weakref.finalize(block._map, told.append, "gone")
    return told


def test_host_memory_outlives_what_copies_it_to_the_device(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where whoever began it is gone, and where it is ended while its bytes are on their way."""
    dropped, released = stack(1), stack(1)
    expected = released[0].weight.detach().clone()
    held = [adopt(dropped, device="cuda", mode="view"), adopt(released, device="cuda", mode="view")]
    told = [unmapped(each._blocks[0].host) for each in held]
    kept = []
    gate.close()
    for each in held:
        assert each.begin()
        each.load()
    assert held[1]._arrival is not None
    kept.append(dropped[0].weight.detach())  # memory on the device is waited for where it is freed
    del dropped, each
    held.pop(0)
    gc.collect()
    assert told == [[], []], "the copy stream still reads it"
    waited: list[str] = []
    wait = Arrival.synchronize

    def open_and_wait(arrival: Arrival) -> None:
        waited.append("for the copy")
        gate.open_all()
        wait(arrival)

    monkeypatch.setattr(Arrival, "synchronize", open_and_wait)
    held[0].release()
    held.clear()
    gc.collect()
    assert waited, "before the memory goes"
    assert told[1] == ["gone"]
    assert same(released[0].weight.cpu(), expected)
    torch.cuda.synchronize()
    last = adopt(stack(1), device="cuda", mode="view")
    last.begin()
    assert told[0] == ["gone"], "another one that begins lets go of those that are over"
    last.release()


def test_what_is_written_while_copies_are_begun_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(1)
    expected = 2.0 * model[0].weight.detach()
    adopted = adopt(model, device="cuda", mode="view")
    fill = Block.fill

    def fill_and_write(block: Block, *args: Any, **kwargs: Any) -> int:
        copied = fill(block, *args, **kwargs)
        torch.cuda.synchronize()
        model[0].weight.mul_(2.0)
        return copied

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(Block, "fill", fill_and_write)
            assert adopted.begin()
        adopted.load()
        assert torch.equal(model[0].weight.cpu(), expected)
    adopted.release()


def test_a_backward_pass_that_asks_from_another_stream_waits_there_too(gate: Gate) -> None:
    with one_on_its_way(gate, stack(1)) as (residency, unit):
        first, second, seen = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(first):
            residency.hold_for_backward(unit)
        with torch.cuda.stream(second):
            residency.hold_for_backward(unit)
            seen.record()
        assert not seen.query(), "the second stream waits, too"
        gate.open()
        residency._backward_ended(-1)


def test_after_an_exception_the_device_is_waited_for() -> None:
    """What the layer had given to other streams is joined by nobody."""

    class Failing(nn.Linear):
        fails = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise ValueError("in the middle")
            return super().forward(x)

    layer, x = Failing(WIDTH, WIDTH, bias=False), torch.randn(2, WIDTH)
    layer.fails = False
    model = nn.Sequential(layer)
    hook = InferenceOptimizerHook(num_prefetch_streams=0)
    with torch.no_grad():
        hook.attach(model)
        model.to("cuda")
        model(x.cuda())
        assert hook.manager is not None
        residency = hook.manager.residency
        unit = residency.units["0"]
        assert unit.ends
        layer.fails = True
        with pytest.raises(ValueError, match="in the middle"):
            model(x.cuda())
        assert unit.ends is None, "not all uses are known"
        assert residency.evict(unit)
        assert unit.ends == []
        with pytest.raises(ValueError, match="outside"), residency.lease(unit):
            raise ValueError("outside")
        assert unit.ends is None
        hook.detach()


def test_nobody_leaves_who_is_saved_or_written_to() -> None:
    hook = InferenceOptimizerHook(num_prefetch_streams=1)
    model, x = stack(2), torch.randn(2, WIDTH)
    with torch.no_grad():
        hook.attach(model)
        model.to("cuda")
        model(x.cuda())
        assert hook.manager is not None
        residency = hook.manager.residency
        unit = residency.units["1"]
        assert unit.ready
        left: list[bool] = []

        def evict(*_: Any) -> None:
            other = threading.Thread(target=lambda: left.append(residency.evict(unit)))
            other.start()
            other.join(PATIENCE)

        handle = model[1].register_load_state_dict_pre_hook(evict)
        state = {name: torch.ones(WIDTH, WIDTH) for name in model.state_dict()}
        model.load_state_dict(state)
        handle.remove()
        assert left == [False]
        assert unit.ends is None, "nobody knows when the copies are over"
        done: list[str] = []
        going, may_go = threading.Event(), threading.Event()

        def last() -> None:
            going.set()
            may_go.wait(0.1)
            done.append("everything that was begun")

        residency.in_background(last)
        assert going.wait(PATIENCE)
        assert all(bool((value == 1).all()) for value in model.state_dict().values())
        assert done
        hook.detach()


@pytest.mark.parametrize("how", ["with PyTorch alone", "by adopting"])
def test_what_another_stream_still_writes_goes_along(gate: Gate, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    model = stack(1).requires_grad_(False)
    expected = (2.0 * model[0].weight).pin_memory()
    model.cuda()
    torch.cuda.synchronize()
    synchronize = torch.cuda.synchronize

    def open_and_wait(device: Any = None) -> None:
        gate.open_all()
        synchronize(device)

    monkeypatch.setattr(torch.cuda, "synchronize", open_and_wait)
    gate.close()
    with torch.cuda.stream(copy_stream(torch, 0)):
        model[0].weight.copy_(expected, non_blocking=True)
    if how == "by adopting":
        adopt(model, device="cuda", mode="view").release()
    else:
        Holding([model[0].weight]).offload()
    assert model[0].weight.device.type == "cpu"
    assert torch.equal(model[0].weight, expected)
