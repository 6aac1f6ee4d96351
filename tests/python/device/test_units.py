"""What `sire.memory` and `sire.slyce` rest on, against naive twins: the order of leaving, files, readings.

Most of it needs no device.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sire
import torch
from sire._units.disk import DiskStore
from sire._units.holding import Holding, Pieces, is_hollow
from sire._units.order import Standing, UseOrder, leaving_order, usage_order
from sire._units.readings import Usage
from sire.memory import MemoryConfig, MemoryManager, MemoryMonitor, MemoryStats
from torch import nn

# --- who leaves --------------------------------------------------------------------------------------------------


def misses(sequence: list[str], room: int, order: UseOrder[str] | None) -> int:
    """Loads that a cache of ``room`` units needs; ``order`` None: least recently used leaves."""
    there: dict[str, int] = {}
    count = 0
    for now, name in enumerate(sequence):
        if name not in there:
            count += 1
            if len(there) == room:
                standing = {each: Standing(idle=now - at) for each, at in there.items()}
                upcoming = [] if order is None else order.upcoming(100)
                del there[leaving_order(standing, upcoming)[0]]
        there[name] = now
        if order is not None:
            order.used(name)
    return count


def fewest_misses(sequence: list[str], room: int) -> int:
    """The naive twin: every choice is tried."""
    best: dict[frozenset[str], int] = {frozenset(): 0}
    for name in sequence:
        following: dict[frozenset[str], int] = {}
        for there, count in best.items():
            if name in there:
                options = [(there, count)]
            elif len(there) < room:
                options = [(there | {name}, count + 1)]
            else:
                options = [((there - {gone}) | {name}, count + 1) for gone in there]
            for state, cost in options:
                following[state] = min(cost, following.get(state, cost))
        best = following
    return min(best.values())


@pytest.mark.parametrize(("units", "room"), [(4, 2), (5, 3), (6, 2), (6, 5)])
def test_once_a_loop_is_known_nobody_leaves_in_vain(units: int, room: int) -> None:
    names = [str(number) for number in range(units)]
    # Of forward and backward passes in turn, least recently used is right already.
    for loop, better in ((names, True), (names + names[-2:0:-1], False)):
        order: UseOrder[str] = UseOrder()
        misses(loop * 2, room, order)
        known = misses(loop * 6, room, order)
        assert known <= fewest_misses(loop * 6, room) + units
        assert known + better <= misses(loop * 6, room, None)


def test_upcoming_tells_forward_from_backward() -> None:
    order: UseOrder[str] = UseOrder()
    for name in "abccbaabc":
        order.used(name)
    assert order.upcoming(10) == ["b", "a", "c"]
    order.used("b")
    assert order.upcoming(2) == ["a", "b"]
    order.forget("a")
    assert order.upcoming(10) == []


def test_leaving_by_usage_agrees_with_sorting_by_hand() -> None:
    chooser = random.Random(3)  # noqa: S311
    for _ in range(200):
        names = [str(number) for number in range(6)]
        standing = {
            name: Standing(chooser.random() * 10, chooser.randint(0, 9), chooser.randint(0, 1)) for name in names
        }
        upcoming = chooser.sample(names, 3)
        found = usage_order(standing, upcoming)
        for first, second in itertools.combinations(found, 2):
            one, other = standing[first], standing[second]
            if one.priority != other.priority:
                assert one.priority < other.priority
            elif (first in upcoming) != (second in upcoming):
                assert second in upcoming
            elif first in upcoming:
                assert upcoming.index(first) > upcoming.index(second)
            else:
                assert one.uses / (1 + one.idle) <= other.uses / (1 + other.idle)


# --- files -------------------------------------------------------------------------------------------------------


def every_dtype() -> list[torch.Tensor]:
    made = [torch.randn(33, 7).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
    return [*made, torch.randn(5, dtype=torch.complex64), torch.randn(0, 4), torch.arange(9), torch.randn(())]


@pytest.mark.parametrize("compress", [True, False])
def test_the_disk_returns_every_bit(tmp_path: Path, compress: bool) -> None:
    store = DiskStore(tmp_path, compress=compress)
    tensors = [*every_dtype(), torch.full((3 << 20,), 0.5), torch.randn(2 << 20)]
    stored = store.write(tensors)
    back = [torch.empty_like(each) for each in tensors]
    store.read(stored, back)
    for one, other in zip(tensors, back, strict=True):
        assert torch.equal(
            one.view(-1).view(torch.uint8) if one.numel() else one,
            other.view(-1).view(torch.uint8) if one.numel() else other,
        )
    assert (store.used < 0.9 * stored.raw_bytes) is compress
    assert os.stat(stored.path).st_mode & 0o777 == 0o600
    store.drop(stored)
    assert store.used == 0
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    store, tensor = DiskStore(tmp_path), torch.randn(1000)
    stored = store.write([tensor])
    content = bytearray(stored.path.read_bytes())
    content[len(content) // 2] ^= 1
    for wrong in (bytes(content), bytes(content[:-1]), b""):
        stored.path.write_bytes(wrong)
        with pytest.raises(sire.BackupIoError, match="stay on the disk"):
            store.read(stored, [torch.empty_like(tensor)])


def test_a_full_disk_leaves_everything_in_memory(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, limit=1000)
    with pytest.raises(sire.OutOfBackupSpaceError, match="max_disk_usage_gb"):
        store.write([torch.randn(1000)])
    assert store.used == 0
    model = nn.Linear(64, 64)
    with MemoryManager(MemoryConfig(max_disk_usage_gb=1e-6, disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(model)
        assert not manager.residency.demote(next(iter(manager.residency.listed())))
        assert manager.events()[-1].what == "failed"
        assert not is_hollow(model.weight)


def test_two_threads_do_not_both_get_the_last_of_the_disk(tmp_path: Path) -> None:
    """What was on the disk was counted before room was taken: a file that another thread finished in between was not
    seen, and the disk took more than its limit.
    """
    store, tensor = DiskStore(tmp_path, limit=1500, compress=False), torch.ones(250)

    class Between:
        """A lock; before it is taken for the second time, another thread's write is over."""

        lock, turns = store._lock, 0

        def __enter__(self) -> None:
            self.turns += 1
            if self.turns == 2:
                with suppress(sire.OutOfBackupSpaceError):
                    store.write([tensor])
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    store._lock = Between()  # type: ignore[assignment]
    with suppress(sire.OutOfBackupSpaceError):
        store.write([tensor])
    assert store.used == 1000


@pytest.mark.parametrize("is_named", [True, False])
def test_a_directory_that_a_killed_process_left_is_swept(
    is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the system's temporary directory, where files are unless one is named, nothing was ever swept."""
    code = (
        "import os, signal, sys, torch; from sire._units.disk import DiskStore; s = DiskStore(*sys.argv[1:]);"
        "s.write([torch.ones(9)]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = tmp_path if is_named else None
    named = [] if parent is None else [str(parent)]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    subprocess.run([sys.executable, "-c", code, *named], check=False, timeout=300)
    (left,) = tmp_path.glob("sire-units-*")
    os.utime(left, (0, 0))
    alive = DiskStore(parent)
    alive.write([torch.ones(9)])
    assert not left.exists()
    DiskStore(parent).write([torch.ones(9)])
    assert alive.directory.exists(), "what a living process has stays"


def status_of_child(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> int:
    """How a forked child ended that did ``work`` after its parent did ``meanwhile``: 0 if nothing was wrong, a signal
    if it took longer than a minute.
    """
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            os.read(ready, 1)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    meanwhile()
    os.write(done, b".")
    os.close(ready)
    os.close(done)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("what", ["reads", "writes", "ends"])
def test_a_forked_child_leaves_its_parents_files_alone(tmp_path: Path, what: str) -> None:
    """The parent's weights were lost: a child that read them removed the file, and one that sent a unit to the disk
    met a file of the same name there, failed, and removed that.
    """
    layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    expected = [each.weight.detach().clone() for each in layers]
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        for each in layers:
            manager.wrap_module(each)
        units = manager.residency.listed()
        assert manager.residency.demote(units[0])

        def in_the_child() -> None:
            if what == "writes":
                assert manager.residency.demote(units[2])
                assert manager.disk.info()["files"] == 1
            if what != "reads":
                manager.cleanup()
            for number in (0, 2):
                assert torch.equal(layers[number].state_dict()["weight"], expected[number])

        assert status_of_child(in_the_child, lambda: manager.residency.demote(units[1])) == 0
        assert is_hollow(layers[1].weight)
        for layer, weight in zip(layers, expected, strict=True):
            assert torch.equal(layer.state_dict()["weight"], weight)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_waits_for_no_thread_of_its_parent(tmp_path: Path) -> None:
    """It hung for ever: it had its parent's queue for the background, but not the thread that works on it."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(1, 4)
    expected = model(x).detach()
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_model(model)
        assert all(manager.residency.demote(unit) for unit in manager.residency.listed())
        for unit in manager.residency.listed():
            assert manager.residency.prefetch(unit).result()

        def in_the_child() -> None:
            assert len(model.state_dict()) == 4
            manager.residency.settle()
            assert manager.residency.prefetch(manager.residency.listed()[0]).result()
            with torch.no_grad():
                assert torch.equal(model(x), expected)
            manager.cleanup()

        assert status_of_child(in_the_child) == 0


# --- tensors that move -------------------------------------------------------------------------------------------


def test_moving_keeps_identity_views_and_strides() -> None:
    base = torch.randn(6, 4)
    tensors = [base, base[1:3], torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(8)[2:4]]
    expected, strides = [each.clone() for each in tensors], [each.stride() for each in tensors]
    identities = [id(each) for each in tensors]
    holding = Holding(tensors)
    holding.load("cuda" if torch.cuda.is_available() else "cpu")
    holding.offload()
    pieces = Pieces(tensors)
    memory = [each.clone() for each in pieces.memory]
    pieces.hollow()
    assert all(is_hollow(each) for each in tensors)
    assert torch.isnan(tensors[0]).all()
    with pytest.raises(RuntimeError):
        tensors[0].add_(1)
    pieces.fill(memory)
    assert [id(each) for each in tensors] == identities
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))
    assert [each.stride() for each in tensors[:3]] == strides[:3]
    base[1, 0] = 7
    assert tensors[1][0, 0] == 7, "a view stays a view"


def few_of_much() -> list[torch.Tensor]:
    """Tensors over small parts of one piece of memory: two of the same bytes, two that overlap, and three alone."""
    memory = torch.randn(10_000)
    overlapping = [memory[3:103].view(10, 10), memory[3:103].view(10, 10), memory[501:511], memory[510:515]]
    return [*overlapping, memory[2000:2010], memory[3000:3100].view(10, 10).t()[1:], memory[4001:4004].view(torch.int)]


@pytest.mark.parametrize("where", ["device", "disk"])
def test_tensors_of_the_same_bytes_share_them_also_where_they_are_a_small_part(where: str) -> None:
    """Of memory that was mostly others', every tensor got a copy of its own: what was written to one was not seen in
    those that had shared it.
    """
    tensors = few_of_much()
    expected = [each.clone() for each in tensors]
    if where == "device":
        holding = Holding(tensors)
        copied = holding.load("cuda" if torch.cuda.is_available() else "cpu")
        holding.offload()
    else:
        pieces = Pieces(tensors)
        copied = sum(each.numel() * each.element_size() for each in pieces.memory)
        memory = [each.clone() for each in pieces.memory]
        pieces.hollow()
        pieces.fill(memory)
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))
    assert copied < 2000
    tensors[0].fill_(2)
    tensors[2].fill_(3)
    assert (tensors[1] == 2).all()
    assert tensors[3][0] == 3
    assert all(torch.equal(one, other) for one, other in zip(tensors[4:], expected[4:], strict=True))
    assert torch.equal(tensors[3][1:], expected[3][1:])


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16, torch.cfloat])
def test_gradients_that_are_zeroed_on_the_disk_come_back_as_zeros(tmp_path: Path, dtype: torch.dtype) -> None:
    """``zero_grad(set_to_none=False)`` was lost for layers on the disk: the old gradients came back and were added to,
    and until then all that stood in for tensors of that dtype was zero.
    """
    layer, other = (nn.Linear(4, 4, bias=False, dtype=dtype) for _ in range(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.ones(1, 4, dtype=dtype)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(layer)
        manager.wrap_module(other)
        layer(x).sum().abs().backward()
        assert all(manager.residency.demote(unit) for unit in manager.residency.listed())
        optimizer.zero_grad(set_to_none=False)
        assert other.weight.isnan().all()
        assert layer.weight.isnan().all()
        layer(x).sum().abs().backward()
        found, layer.weight.grad = layer.weight.grad, None
        layer(x).sum().abs().backward()
        assert torch.equal(found, layer.weight.grad)


def test_rows_of_a_gradient_that_are_written_on_the_disk_are_those_that_change() -> None:
    gradients = [torch.randn(3, 4), torch.randn(4), torch.tensor(2.0), torch.randn(2, 2).to(torch.float8_e5m2)]
    expected = [each.clone() for each in gradients]
    pieces = Pieces([], gradients)
    memory = [each.clone() for each in pieces.memory]
    pieces.hollow()
    gradients[0][1].zero_()
    expected[0][1].zero_()
    for each, other in ((gradients[1], expected[1]), (gradients[3], expected[3])):
        each.zero_()
        other.zero_()
    pieces.fill(memory)
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(gradients, expected, strict=True))


def test_what_has_no_elements_stands_in_for_nothing_else() -> None:
    """The stand-in of an empty tensor had address 0, as every empty tensor has: all of those counted as hollow."""
    pieces = Pieces([torch.randn(0, 4), torch.randn(3, 4)])
    memory = [each.clone() for each in pieces.memory]
    pieces.hollow()
    assert not is_hollow(torch.empty(0))
    pieces.fill(memory)


def test_a_weight_that_is_written_on_the_disk_comes_back_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """Of a weight's elements, nobody can tell which were written to while one stood in for all: the log says so."""
    weights = [torch.randn(3, 4), torch.randn(3, 4)]
    expected = [each.clone() for each in weights]
    pieces = Pieces(weights)
    memory = [each.clone() for each in pieces.memory]
    pieces.hollow()
    nn.init.zeros_(weights[0])
    assert weights[1].isnan().all()
    pieces.fill(memory)
    assert all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))
    (record,) = caplog.records
    assert "of shape [3, 4] was written to while it was on the disk: that is lost" in record.getMessage()


def test_what_an_evaluation_brings_from_the_disk_can_be_trained(tmp_path: Path) -> None:
    """In inference mode, tensors became such that need no gradients when they went to the disk or came from it."""
    layer, x = nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_module(layer)
        with torch.inference_mode():
            assert manager.residency.demote(manager.residency.listed()[0])
            assert not layer.weight.is_inference()
            layer(x)
        layer(x).sum().backward()
        assert torch.equal(layer.weight.grad, torch.ones(4, 4))


def test_what_an_evaluation_brings_to_the_device_can_be_trained() -> None:
    """Moved with PyTorch alone in inference mode, parameters became tensors that need no gradients, for ever."""
    weight, frozen = nn.Parameter(torch.ones(4, 4)), torch.ones(4)
    weight.grad = torch.ones(4, 4)
    holding = Holding([weight, frozen])
    with torch.inference_mode():
        made_there = torch.ones(4)
        holding.load("cuda" if torch.cuda.is_available() else "cpu")
        Holding([made_there]).load("cpu")
    assert not any(each.is_inference() for each in (weight, weight.grad, frozen))
    holding.offload()
    (torch.ones(1, 4) @ weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 4), 2.0))
    assert torch.equal(made_there, torch.ones(4))


def test_moving_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sire._units import holding

    tensors = [torch.randn(4), torch.randn(4), torch.randn(4)]
    before, addresses = [each.clone() for each in tensors], [each.data_ptr() for each in tensors]
    calls = iter(range(10))

    def failing(device: Any, size: int) -> torch.Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("on purpose")
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(holding, "_bytes_on", failing)
    with pytest.raises(torch.OutOfMemoryError):
        Holding(tensors).load("cuda")
    assert [each.data_ptr() for each in tensors] == addresses
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def test_a_prefetch_that_fails_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sire._units.unit import Unit

    original = Unit.load

    def failing(self: Unit) -> int:
        if threading.current_thread().name.startswith("sire-units"):
            raise RuntimeError("on purpose")
        return original(self)

    monkeypatch.setattr(Unit, "load", failing)
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), torch.ones(1, 8)
    expected = model(x)
    with MemoryManager(MemoryConfig(disk_cache_dir=tmp_path)) as manager:
        manager.wrap_model(model)
        for _ in range(3):
            assert all(manager.residency.demote(unit) for unit in manager.residency.listed())
            assert torch.equal(model(x), expected)
            manager.residency.settle()
        assert any("on purpose" in event.note for event in manager.events())


@pytest.mark.parametrize("straight_to_disk", [True, False])
def test_what_a_backward_pass_uses_stays(tmp_path: Path, straight_to_disk: bool) -> None:
    """A unit went to the disk while a backward pass used it: the pass raised, or its kernel read memory without pages;
    now it stays until the pass is over.
    """
    layer, x = nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    manager = MemoryManager(MemoryConfig(enable_cpu_offload=not straight_to_disk, disk_cache_dir=tmp_path))
    manager.wrap_module(layer)
    (unit,) = manager.residency.listed()
    layer(x).sum().backward()
    went: list[bool] = []

    def in_the_middle(_: torch.Tensor) -> None:
        went.append(manager.residency.demote(unit))
        with pytest.raises(sire.BusyError, match=r"offloaded now: a backward pass uses it\. Repeat the call"):
            layer.offload_all()

    layer.weight.register_hook(in_the_middle)
    layer(x).sum().backward()
    assert went == [False]
    assert torch.equal(layer.weight.grad, torch.full((4, 4), 2.0))
    assert manager.residency.demote(unit), "the pass is over"
    manager.cleanup()


def test_a_backward_pass_that_failed_uses_nothing(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4, bias=False)
    manager = MemoryManager(MemoryConfig(disk_cache_dir=tmp_path))
    manager.wrap_module(layer)

    def divide(_: torch.Tensor) -> None:
        raise ZeroDivisionError

    layer.weight.register_hook(divide)
    with pytest.raises(ZeroDivisionError):
        layer(torch.ones(1, 4)).sum().backward()
    layer.offload_all()
    assert manager.residency.demote(manager.residency.listed()[0])
    manager.cleanup()


# --- readings and what they lead to ------------------------------------------------------------------------------


def full(share: float) -> Usage:
    return Usage(1000, 1000 - int(share * 1000))


def test_host_memory_that_is_short_sends_units_to_the_disk_in_batches(tmp_path: Path) -> None:
    config = MemoryConfig(offload_batch_size=2, disk_cache_dir=tmp_path)
    manager = MemoryManager(config)
    model = manager.wrap_model(nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]))
    calm, short, emergency = (MemoryStats(0.0, {}, full(share), full(0)) for share in (0.5, 0.92, 0.99))
    assert manager.relieve_cpu(calm) == 0
    model(torch.ones(1, 8))
    assert manager.relieve_cpu(MemoryStats(0.0, {}, Usage(10**6, 0), full(0))) >= 2
    manager.load_all_modules()
    assert manager.relieve_cpu(short) == 1, "one is enough for 20 bytes"
    manager.load_all_modules()
    with manager.residency.lease(manager.residency.listed()[0]):
        assert manager.relieve_cpu(emergency) == 4, "everything but what is in use"
    manager.cleanup()


def test_the_monitor_judges_by_its_settings() -> None:
    shares = iter([0.1, 0.3, 0.5, 0.72, 0.86, 0.96])
    monitor = MemoryMonitor(
        MemoryConfig(), {"gpus": lambda: {0: full(next(shares))}, "cpu": lambda: full(0.5), "disk": lambda: full(0.1)}
    )
    said = []
    for _ in range(6):
        monitor.look()
        said.append(
            (monitor.can_reload_to_gpu(), monitor.should_offload_from_gpu(), monitor.should_emergency_offload_gpu())
        )
    assert said == [(True, False, False)] * 3 + [(False, False, False), (False, True, False), (False, True, True)]
    assert monitor.predict_memory_pressure()["gpu"] == 1.0
    assert monitor.predict_memory_pressure()["cpu"] == 0.5


def test_the_monitor_runs_now_and_then_and_stops() -> None:
    monitor, looks = MemoryMonitor(MemoryConfig(memory_check_interval=0.01)), []
    monitor.start_monitoring(looks.append)
    monitor.start_monitoring(looks.append)
    deadline = time.monotonic() + 20
    while len(looks) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    monitor.stop_monitoring()
    count = len(looks)
    assert count >= 3
    assert "sire-memory-monitor" not in [each.name for each in threading.enumerate()]
    assert looks[-1].cpu.total > 0


def test_a_monitor_serves_several() -> None:
    monitor, first, second = (
        MemoryMonitor(MemoryConfig(memory_check_interval=0.01)),
        threading.Event(),
        threading.Event(),
    )
    one, other = (lambda _stats: first.set()), (lambda _stats: second.set())
    monitor.start_monitoring(one)
    monitor.start_monitoring(other)
    assert first.wait(20)
    assert second.wait(20)
    monitor.stop_monitoring(one)
    first.clear()
    second.clear()
    assert second.wait(20), "the other is still told"
    assert not first.is_set()
    monitor.stop_monitoring(other)
    assert not monitor.monitoring


def test_a_look_that_fails_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    monitor, looks = MemoryMonitor(MemoryConfig(memory_check_interval=0.01)), threading.Semaphore(0)

    def fails(_stats: Any) -> None:
        looks.release()
        raise OSError("nothing can be moved")

    monitor.start_monitoring(fails)
    assert all(looks.acquire(timeout=20) for _ in range(3))
    assert monitor.monitoring
    monitor.stop_monitoring()
    assert not monitor.monitoring
    assert "nothing can be moved" in caplog.text


def test_monitoring_costs_at_most_one_percent() -> None:
    monitor = MemoryMonitor()
    for _ in range(50):
        monitor.look()
    assert monitor.seconds_spent / 50 <= 0.01 * monitor.config.memory_check_interval


def test_summaries_are_complete_before_anything_happened() -> None:
    summary = MemoryManager().get_memory_summary()
    assert {"timestamp", "gpu", "cpu", "disk", "recommendations", "modules", "system"} <= summary.keys()
    assert {"active", "auto_manage", "managed_modules", "total_offloads", "total_reloads", "uptime_seconds"} <= summary[
        "system"
    ].keys()
    assert 0.0 <= summary["gpu"]["usage_ratio"] <= 1.0
