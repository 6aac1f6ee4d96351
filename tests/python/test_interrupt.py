"""Ctrl-C during a pause or resume: it cancels, waits for the roll-back, and arrives."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sire
from running import until
from sire import _interrupt

from fake_library import FakeLibrary


@contextmanager
def interrupted(heard: Callable[[], bool], times: int = 1, number: int = signal.SIGINT) -> Iterator[None]:
    """Signals, as soon as there is something to interrupt; all have come when the block is over."""

    def interrupt() -> None:
        until("there is something to interrupt", heard)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.02)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        while True:
            try:
                thread.join()
                break
            except KeyboardInterrupt:
                continue


@pytest.fixture
def held(library: FakeLibrary) -> FakeLibrary:
    """A library whose calls do not end by themselves."""
    with sire.region("a"):
        pass
    library.gate = threading.Event()
    return library


def test_ctrl_c_cancels_and_is_raised(held: FakeLibrary) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupted(lambda: "pause" in held.calls):
        sire.pause("a")
    assert "cancel" in held.calls
    assert held.paused == set()
    assert any("rolled back" in note for note in getattr(caught.value, "__notes__", ["rolled back"]))
    held.gate = None
    assert sire.pause("a").changed


def test_ctrl_c_that_wakes_another_thread_is_heard(held: FakeLibrary) -> None:
    """The main thread slept on until the call was over, as it does when the signal comes just before it waits."""
    begun = threading.Event()

    def interrupt() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        begun.set()
        until("there is something to interrupt", lambda: "pause" in held.calls)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        held.cancelled.wait(30)
        gate.set()

    gate = threading.Event()
    held.gate = gate
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        begun.wait()
        with pytest.raises(KeyboardInterrupt):
            sire.pause("a")
    finally:
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert "cancel" in held.calls


def test_resume_is_cancelled_too(held: FakeLibrary) -> None:
    held.paused = {0}
    with pytest.raises(KeyboardInterrupt), interrupted(lambda: "resume" in held.calls):
        sire.resume("a")
    assert held.paused == {0}


def test_impatience_does_not_leave_the_call_behind(held: FakeLibrary) -> None:
    held.rollback_seconds = 0.5
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted(lambda: "pause" in held.calls, times=3):
        sire.pause("a")
    assert time.monotonic() - started > 0.5
    assert held.paused == set()


def test_other_signals_exceptions_pass_as_they_are(held: FakeLibrary) -> None:
    class StopError(RuntimeError):
        pass

    def handler(number: int, frame: object) -> None:
        raise StopError

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(StopError), interrupted(lambda: "pause" in held.calls, number=signal.SIGUSR1):
            sire.pause("a")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert held.calls.count("pause") == 1


def test_errors_of_the_call_arrive_unchanged(library: FakeLibrary) -> None:
    with pytest.raises(sire.UnknownTagError) as caught:
        sire.pause("nobody")
    assert caught.value.status == 4


def test_calls_work_where_no_thread_can_be_started(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with sire.region("a"):
        pass
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    assert sire.pause("a").changed


def test_other_threads_call_directly(library: FakeLibrary) -> None:
    with sire.region("a"):
        pass
    reports: list[sire.Report] = []
    thread = threading.Thread(target=lambda: reports.append(sire.pause("a")))
    thread.start()
    thread.join()
    assert reports[0].changed


def test_the_second_thread_holds_nothing_when_the_first_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it let go of after the end of the program would take the process down, if that was PyTorch's."""
    first_went_on, died = threading.Event(), []

    class Held:
        def __del__(self) -> None:
            died.append(threading.current_thread() is threading.main_thread())

    class Slow(threading.Event):
        def set(self) -> None:
            super().set()
            assert first_went_on.wait(60)

    monkeypatch.setattr(_interrupt.threading, "Event", Slow)

    def calls(held: Held) -> None:
        result = _interrupt.run(lambda: [held], lambda: None)
        assert result == [held]

    try:
        calls(Held())
        assert died == [True]
    finally:
        first_went_on.set()


class HeardError(Exception):
    """What a handler of these tests raises."""


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Handlers that note two signals, the second one by raising."""
    heard: list[int] = []

    def raises(number: int, _frame: object) -> None:
        heard.append(number)
        raise HeardError

    before = signal.signal(signal.SIGUSR1, lambda number, _frame: heard.append(number))
    also_before = signal.signal(signal.SIGUSR2, raises)
    yield heard
    signal.signal(signal.SIGUSR1, before)
    signal.signal(signal.SIGUSR2, also_before)


def test_handlers_run_after_what_is_not_to_be_left_half_done(handled: list[int]) -> None:
    steps = 0
    with pytest.raises(HeardError), _interrupt.deferred():
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGUSR1)
        assert handled == []
        steps = 1
    assert (steps, handled) == (1, [signal.SIGUSR2, signal.SIGUSR1]), "each runs, in the order of the signals"
    with pytest.raises(HeardError):
        signal.raise_signal(signal.SIGUSR2)


def test_within_it_the_programs_own_functions_hear_signals_at_once(handled: list[int]) -> None:
    with _interrupt.deferred():
        with pytest.raises(HeardError), _interrupt.undeferred():
            signal.raise_signal(signal.SIGUSR2)
        assert handled == [signal.SIGUSR2]
        with _interrupt.deferred(), _interrupt.undeferred():
            # The outer block is not to be left half-done either.
            signal.raise_signal(signal.SIGUSR1)
        assert handled == [signal.SIGUSR2]
    assert handled == [signal.SIGUSR2, signal.SIGUSR1]
    with _interrupt.undeferred():
        signal.raise_signal(signal.SIGUSR1)
    assert handled[2:] == [signal.SIGUSR1]


def test_a_handler_that_is_set_meanwhile_stays(handled: list[int]) -> None:
    with _interrupt.deferred():
        signal.signal(signal.SIGUSR1, lambda number, _frame: handled.append(-number))
    signal.raise_signal(signal.SIGUSR1)
    assert handled == [-signal.SIGUSR1]
