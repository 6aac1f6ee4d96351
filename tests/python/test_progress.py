"""Progress: waiting, interrupting, failing, forgetting. No device: the library is a stand-in."""

from __future__ import annotations

import gc
import math
import threading
import time
from types import SimpleNamespace

import pytest
import sire

from fake_library import FakeLibrary
from test_interrupt import interrupted


@pytest.fixture
def held(library: FakeLibrary) -> FakeLibrary:
    """A paused region whose resume does not end by itself."""
    with sire.region("a"):
        pass
    sire.pause("a")
    library.gate = threading.Event()
    return library


def release(library: FakeLibrary) -> None:
    assert library.gate is not None
    library.gate.set()


def test_it_returns_at_once_and_ends_later(held: FakeLibrary) -> None:
    progress = sire.resume("a", non_blocking=True)
    assert not progress.ready()
    assert progress.report() is None
    assert progress.wait(timeout=0.01) is False
    assert (progress.bytes_ready, progress.bytes_total) == (0, 1)
    assert "'a'" in repr(progress)
    release(held)
    assert progress.wait() is True
    assert progress.ready()
    report = progress.report()
    assert report is not None
    assert report.changed


def test_prefetch_is_a_resume_in_the_background(held: FakeLibrary) -> None:
    progress = sire.prefetch("a")
    release(held)
    assert progress.wait_stream()


class Stream:
    """A CUDA stream, as far as it is asked."""

    def __init__(self, device: int | None = None) -> None:
        self.device = SimpleNamespace(index=1 if device is None else device)
        self.cuda_stream = 77


class Event:
    """A CUDA event."""

    device = 0
    recorded: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded = stream


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch with a current stream."""
    cuda = SimpleNamespace(current_stream=Stream, Stream=Stream, is_current_stream_capturing=lambda: False)
    torch = SimpleNamespace(cuda=cuda)
    monkeypatch.setattr("sire._torch.cuda_in_use", lambda: torch)
    monkeypatch.setattr("sire._torch.device_index", lambda _torch, device: device)
    monkeypatch.setattr("sire._progress._event_streams", {})


def test_a_stream_is_named_by_its_device_and_handle(held: FakeLibrary, streams: None) -> None:
    progress = sire.resume("a", non_blocking=True)
    assert progress.wait_stream(timeout=0.01) is False
    assert held.settings["stream"] == (1, 77)
    event = Event()
    assert progress.wait_stream(event, timeout=0.01) is False
    assert event.recorded is None
    release(held)
    assert progress.wait_stream(event) is True
    assert held.settings["stream"] == (0, 77)
    assert event.recorded is not None
    assert event.recorded.device.index == 0


def test_ctrl_c_ends_the_waiting_for_a_stream(held: FakeLibrary, streams: None) -> None:
    progress = sire.resume("a", non_blocking=True)
    with pytest.raises(KeyboardInterrupt), interrupted(lambda: True):
        progress.wait_stream()
    assert "cancel" not in held.calls
    release(held)
    assert progress.wait_stream()


def test_ctrl_c_ends_the_waiting_and_not_the_resume(held: FakeLibrary) -> None:
    progress = sire.resume("a", non_blocking=True)
    with pytest.raises(KeyboardInterrupt), interrupted(lambda: True):
        progress.wait()
    assert "cancel" not in held.calls
    release(held)
    assert progress.wait()


def test_a_failure_arrives_where_somebody_waits(held: FakeLibrary) -> None:
    progress = sire.resume("a", non_blocking=True)
    progress.cancel()
    for ask in (progress.wait, progress.wait_stream, progress.report):
        with pytest.raises(sire.CancelledError):
            for _ in range(100):
                ask()
                time.sleep(0.01)
    held.gate = None
    assert sire.resume("a").changed


def test_what_can_be_refused_is_refused_at_once(library: FakeLibrary) -> None:
    with pytest.raises(sire.UnknownTagError):
        sire.resume("nobody", non_blocking=True)


def test_a_forgotten_progress_is_closed(held: FakeLibrary) -> None:
    sire.resume("a", non_blocking=True)
    gc.collect()
    assert held.closed == [1]
    release(held)


@pytest.mark.parametrize("timeout", [-1, math.nan, "1", True])
def test_bad_timeouts(held: FakeLibrary, timeout: float) -> None:
    progress = sire.resume("a", non_blocking=True)
    with pytest.raises(sire.InvalidArgumentError):
        progress.wait(timeout=timeout)
    release(held)


def test_bad_arguments(held: FakeLibrary) -> None:
    progress = sire.prefetch("a")
    for wrong in (5, "tensor", object()):
        with pytest.raises(sire.InvalidArgumentError):
            progress.wait(wrong)
        with pytest.raises(sire.InvalidArgumentError):
            progress.wait_stream(wrong)
        with pytest.raises(sire.InvalidArgumentError):
            sire.resume("a", order=wrong)
    with pytest.raises(sire.InvalidArgumentError):
        sire.resume("a", order=[1, 2])
    with pytest.raises(sire.InvalidArgumentError):
        sire.learn_order("a module")
    release(held)
