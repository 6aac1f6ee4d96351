"""Long calls into the library that Ctrl-C can stop.

Python runs signal handlers only between bytecodes of the main thread, so a call that the main thread makes into
C cannot be interrupted. Here the call runs in a second thread while the main thread waits where handlers run.
If a handler raises, the library is told to cancel; it stops at the next chunk and rolls back, and then
the handler's exception goes on.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar

from ._errors import CancelledError, raise_kept

_T = TypeVar("_T")

_SIGNALS = tuple(int(number) for number in signal.valid_signals())

_RETRY_SECONDS = 0.02
# A signal that arrives just before a thread waits, or in another thread, does not wake it.
_LOOK_SECONDS = 0.5


def run(call: Callable[[], _T], cancel: Callable[[], object]) -> _T:
    """The result of ``call()``; an exception of a signal handler cancels it first.

    Where that comes too late the exception is raised all the same, and the result is lost: who needs it has ``call``
    put it somewhere.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    return _Job(call).run(cancel)


@contextmanager
def deferred() -> Iterator[None]:
    """Signal handlers (Ctrl-C's) run after the block, which is not to be left half-done.

    A call into C that calls Python back belongs into one: an exception that a handler raises where such a function
    begins is nobody's, `ctypes` prints it, and the signal is lost.
    """
    global _deferral
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, own = _deferral, _Deferral()
    with ExitStack() as stack:
        stack.callback(own.deliver)
        stack.callback(own.end)
        own.begin()
        _deferral = own
        try:
            yield
        finally:
            _deferral = outer


@contextmanager
def undeferred() -> Iterator[None]:
    """Within a `deferred` block: handlers run at once, as in code that knows nothing of it."""
    deferral = _deferral
    if deferral is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    deferral.end()
    try:
        yield
    finally:
        deferral.begin()


class _Deferral:
    """Stands in for all signal handlers of the program, and notes what comes."""

    def __init__(self) -> None:
        found = {number: signal.getsignal(number) for number in _SIGNALS}
        self._handlers = {number: handler for number, handler in found.items() if callable(handler)}
        self._came: list[int] = []

    def begin(self) -> None:
        for number in self._handlers:
            signal.signal(number, self._note)

    def end(self) -> None:
        """Whatever comes in between, and unless somebody has set another handler meanwhile."""
        with ExitStack() as stack:
            for number, handler in self._handlers.items():
                if signal.getsignal(number) == self._note:
                    stack.callback(signal.signal, number, handler)

    def deliver(self) -> None:
        """Not sent again, which those who listen to `signal.set_wakeup_fd` would hear twice."""
        with ExitStack() as stack:
            for number in reversed(self._came):
                stack.callback(self._handlers[number], number, None)

    def _note(self, number: int, _frame: object) -> None:
        self._came.append(number)


_deferral: _Deferral | None = None


class _Job(Generic[_T]):
    def __init__(self, call: Callable[[], _T]) -> None:
        self._calls = [call]
        self._lock = threading.Lock()
        self._begun = False
        self._abandoned = False
        self._done = threading.Event()
        self._result: _T
        self._errors: list[BaseException] = []

    def run(self, cancel: Callable[[], object]) -> _T:
        try:
            if not self._start():
                return self._calls.pop()()
            while not self._done.wait(_LOOK_SECONDS):
                pass
        except BaseException as interruption:
            if self._stop(cancel) and sys.version_info >= (3, 11):
                interruption.add_note(f"Sire: {self._outcome()}")
            raise
        # All that is left goes here.
        raise_kept(self._errors)
        result = self._result
        del self._result
        return result

    def _start(self) -> bool:
        """Whether the second thread runs; without one the call goes uninterrupted."""
        try:
            _thread.start_new_thread(self._work, ())
        except RuntimeError as error:
            if "thread" in str(error):
                return False
            raise
        return True

    # Nothing is let go of in the second thread once the first has gone on, perhaps to the end of the program: for a
    # tensor or an event PyTorch gives the interpreter's lock up, and a thread that asks for it again after the end
    # takes the process down.
    def _work(self) -> None:
        with self._lock:
            if self._abandoned:
                return
            self._begun = True
            call = self._calls.pop()
        try:
            self._result = call()
        except BaseException as error:
            self._errors.append(error)
        finally:
            del call
            self._done.set()

    def _stop(self, cancel: Callable[[], object]) -> bool:
        """Waits until the call is over, one way or the other; False if it never began."""
        with self._lock:
            if not self._begun:
                self._abandoned = True
                return False
        while not self._done.is_set():
            try:
                # Repeated: a cancel that arrives before the library has begun the call is lost.
                cancel()
                self._done.wait(_RETRY_SECONDS)
            except BaseException:  # a second Ctrl-C: the roll-back is still awaited
                continue
        return True

    def _outcome(self) -> str:
        error = next(iter(self._errors), None)
        if isinstance(error, CancelledError):
            return "the call was cancelled and rolled back"
        if error is not None:
            return f"the call failed: {error}"
        return "the call had already completed"
