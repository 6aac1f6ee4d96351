"""A process that can start no other thread: calls that need one say so, leave nothing behind, and can be repeated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import managed
import pytest
import sire
import torch
from sire.memory import MemoryConfig, MemoryManager, MemoryMonitor, ModuleWrapper, auto_manage_model
from sire.slyce import SlyceModel
from sire.torchtools import _measure
from torch import nn

fresh_pools = pytest.fixture(managed.fresh)
Crowded = Callable[[], AbstractContextManager[None]]
SAYS = "this process cannot start another thread: can't start new thread. End others, or raise the limit"


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Crowded:
    """A context in which the system gives this process no thread."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    @contextmanager
    def refused() -> Iterator[None]:
        with monkeypatch.context() as patch, pytest.raises(sire.SireError, match=SAYS):
            patch.setattr(threading.Thread, "start", refuse)
            yield

    return refused


def test_a_monitor_that_could_not_begin_can_be_stopped_and_begun(crowded: Crowded) -> None:
    """`stop_monitoring` and `cleanup` said that a thread could not be joined which never began."""
    monitor, looks = MemoryMonitor(MemoryConfig(memory_check_interval=0.01)), threading.Semaphore(0)
    told = []
    with crowded():
        monitor.start_monitoring(told.append)
    assert not monitor.monitoring
    monitor.stop_monitoring()
    with crowded():
        monitor.start_monitoring(told.append)
    monitor.start_monitoring(lambda _stats: looks.release())
    assert looks.acquire(timeout=20)
    monitor.stop_monitoring()
    assert told == [], "whose call failed is not told"


def test_a_manager_that_could_not_begin_manages_nothing(crowded: Crowded) -> None:
    manager = MemoryManager()
    with crowded():
        manager.start()
    assert manager.get_memory_summary()["system"]["uptime_seconds"] == 0
    manager.cleanup()
    model = nn.Sequential(nn.Linear(8, 8)).cuda()
    with crowded():
        auto_manage_model(model)
    assert not isinstance(model[0], ModuleWrapper)
    assert model(torch.ones(1, 8, device="cuda")).is_cuda


def test_a_slice_that_could_not_be_brought_in_the_background_is_brought_when_it_is_used(crowded: Crowded) -> None:
    slices = [{"name": "one", "constructor": nn.Linear, "config": (8, 8)}]
    model = SlyceModel(slices, gpu_strategy="limit_gpu", log_to_console=False)
    with crowded():
        model.preload("one")
    with crowded():
        model.offload_slice("one", non_blocking=True)
    assert model(torch.ones(1, 8)).is_cuda
    assert model.summary().slices[0].tier == "gpu", "what failed is not done later"
    assert model.offload_slice("one", non_blocking=True).result(60) is None
    model.close()


@pytest.mark.usefixtures("fresh_pools")
def test_a_model_that_could_not_be_prefetched_is_nobodys(crowded: Crowded) -> None:
    model = managed.layers()
    with crowded():
        sire.prefetch(model)
    user = sire.manage(model).user
    assert user.locks == 0
    with sire.prefetch(model) as begun:
        assert begun.wait(60)
    assert user.locks == 0


def test_a_socket_that_could_not_be_opened_is_closed(
    crowded: Crowded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with crowded():
        sire.control.open()
    assert list(tmp_path.rglob("*.sock")) == []


def test_a_time_slice_that_could_not_begin_gives_its_turn_back(
    crowded: Crowded, preloaded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not preloaded:
        pytest.skip("time slices need a hook mode in which everything is heard")
    monkeypatch.setenv("TORCHTOOLS_LOCK_DIR", str(tmp_path))
    turns = sire.time_slice(group="crowded")
    with crowded():
        turns.__enter__()
    assert turns.figures == {}
    with turns:
        assert turns.figures["state"] == "resident"


def test_a_probe_that_could_not_be_watched_is_an_error(crowded: Crowded) -> None:
    torch.cuda.init()
    with crowded():
        _measure.run(torch.ones, (1,), {"device": "cuda"}, 0)
