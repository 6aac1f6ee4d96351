"""Resumes that go on in the background: what can be used already, waiting for the rest, the order of coming back."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from . import _library, _memory
from ._errors import BusyError, InvalidArgumentError
from ._report import Report

Ranges: TypeAlias = list[tuple[int, int]]

# One call into the library waits no longer, so that signal handlers run.
_SLICE_SECONDS = 0.1


class Progress:
    """A resume that goes on in the background. All methods may be called from any thread.

    Whoever uses memory that is not ready meets an illegal address, so wait for it first; work that is given to the
    device after a wait sees the memory, on any stream. Nothing is ready before all memory of the call is there. If
    the call fails, waiting raises its exception, the tags are paused again, what was ready stays until the next pause
    or resume, and the call can be repeated. A `Progress` that is forgotten harms nothing: the resume goes on.
    """

    def __init__(
        self,
        library: _library.Library,
        handle: int,
        tag: str | None,
        at_end: Callable[[str | None], object] | None = None,
    ) -> None:
        self._library = library
        self._handle = handle
        self._tag = tag
        # Called once, by whoever is told that it is over, if it has brought anything back.
        self._at_end = [] if at_end is None else [at_end]
        self._close = weakref.finalize(self, library.progress_close, handle)
        # At exit the library stops what is under way by itself, after threads that may still be waiting.
        self._close.atexit = False

    def ready(self, tensor: Any = None) -> bool:
        """Whether the tensor can be used now; without one, whether the resume is over. Never blocks.

        A tensor that the resume does not concern counts as ready. Without one, a failure is raised.
        """
        if tensor is None:
            return self.wait(timeout=0.0)
        return self._library.progress_ready(self._handle, *_memory.span(tensor, "ready")[0])

    def wait(self, tensor: Any = None, timeout: float | None = None) -> bool:
        """Waits until the tensor can be used, or, without one, until the resume is over.

        At most ``timeout`` seconds; False if it did not come to that. Raises what the resume failed with. Ctrl-C ends
        the waiting, not the resume.
        """
        pointer, size = (0, 0) if tensor is None else _memory.span(tensor, "wait")[0]
        if tensor is not None and not size:
            return True
        end = time.monotonic() + _timeout(timeout)
        while True:
            left = max(end - time.monotonic(), 0.0)
            if self._library.progress_wait(self._handle, pointer, size, min(left, _SLICE_SECONDS)):
                if tensor is None:
                    self.report()
                return True
            if left <= _SLICE_SECONDS:
                return False

    def wait_stream(self, stream: Any = None, tensor: Any = None, timeout: float | None = None) -> bool:
        """As `wait`, where code has a stream at hand: what it is given from now on finds the memory there.

        The calling thread is what waits. ``stream`` need not be told anything, because when this returns the bytes
        have arrived; it is checked, and may be a `torch.cuda.Stream`, a `torch.cuda.Event` or None.
        """
        if stream is not None and not hasattr(stream, "wait_stream") and not hasattr(stream, "record"):
            raise InvalidArgumentError(f"wait_stream takes a CUDA stream or event, not {type(stream).__name__}")
        return self.wait(tensor, timeout)

    def report(self) -> Report | None:
        """What the resume did; None while it is not over. Raises what it failed with."""
        try:
            report = Report("resume", self._tag, **self._library.progress_report(self._handle))
        except BusyError:
            return None
        self._end(report)
        return report

    def _end(self, report: Report) -> None:
        try:
            # One thread of several gets it.
            at_end = self._at_end.pop()
        except IndexError:
            return
        if report.changed:
            at_end(self._tag)

    @property
    def bytes_ready(self) -> int:
        """Bytes of device memory that can be used already."""
        return self._library.progress_bytes(self._handle)[0]

    @property
    def bytes_total(self) -> int:
        """Bytes of device memory that the resume brings back."""
        return self._library.progress_bytes(self._handle)[1]

    def cancel(self) -> None:
        """Makes the resume stop. What is ready stays; the tags end paused, unless everything was ready."""
        self._library.progress_cancel(self._handle)

    @contextmanager
    def guarding(self, module: Any) -> Iterator[Progress]:
        """Inside, each part of the module waits for its own parameters and buffers before it runs.

        So a forward can begin while the last layers are still on their way.
        """
        hooks = []
        try:
            for part in module.modules():
                tensors = _own_tensors(part)
                if tensors:
                    hooks.append(part.register_forward_pre_hook(_waiter(self, tensors)))
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def __repr__(self) -> str:
        what = "everything" if self._tag is None else repr(self._tag)
        ready, total = self._library.progress_bytes(self._handle)
        return f"<sire progress of {what}: {ready} of {total} bytes>"


def _waiter(progress: Progress, tensors: list[Any]) -> Any:
    def wait(_module: Any, _inputs: Any) -> None:
        for tensor in tensors:
            progress.wait(tensor)

    return wait


def _own_tensors(module: Any) -> list[Any]:
    """Parameters and buffers of the module itself that are on a CUDA device."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [each for each in own if each.is_cuda]


def _timeout(timeout: object) -> float:
    if timeout is None:
        return math.inf
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or math.isnan(timeout) or timeout < 0:
        raise InvalidArgumentError(f"timeout is None or 0 or more seconds, not {timeout!r}")
    return float(timeout)


# --- the order -------------------------------------------------------------------------------------------


class Order:
    """The order in which a module uses its memory, learned from a forward. `learn_order` makes one."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._hooks: list[Any] = []

    @property
    def ranges(self) -> Ranges:
        """(Address, bytes) in the order of first use."""
        return list(self._seen.items())

    @property
    def learned(self) -> bool:
        """Whether a forward has come to its end."""
        return bool(self._seen) and not self._hooks

    def forget(self) -> None:
        """Removes the hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    def _add(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            pointer, size = _memory.span(tensor, "an order")[0]
            if size:
                self._seen[pointer] = max(size, self._seen.get(pointer, 0))

    def _watch(self, module: Any) -> None:
        for part in module.modules():
            tensors = _own_tensors(part)
            if tensors:
                hook = part.register_forward_pre_hook(lambda _module, _inputs, own=tensors: self._add(own))
                self._hooks.append(hook)
        self._hooks.append(module.register_forward_hook(lambda _module, _inputs, _outputs: self.forget()))


def learn_order(module: Any) -> Order:
    """Learns from the module's next forward in which order its parameters and buffers are used.

    Give the result as ``order`` to `sire.resume` or `sire.prefetch`: memory then comes back in that order, and a
    forward can begin before the last layers are there (`Progress.guarding`).
    """
    if not hasattr(module, "modules") or not hasattr(module, "register_forward_hook"):
        raise InvalidArgumentError(f"learn_order takes a torch.nn.Module, not {type(module).__name__}")
    order = Order()
    order._watch(module)
    return order


def order_ranges(order: object) -> Ranges:
    """An ``order`` argument as the library takes it: an `Order`, a module, or tensors."""
    if order is None:
        return []
    if isinstance(order, Order):
        return order.ranges
    if hasattr(order, "modules"):
        tensors: Iterable[Any] = [tensor for part in order.modules() for tensor in _own_tensors(part)]
    elif isinstance(order, Iterable) and not isinstance(order, str | bytes):
        tensors = order
    else:
        raise InvalidArgumentError(f"order is an Order, a module or tensors, not {type(order).__name__}")
    return [_memory.span(tensor, "order")[0] for tensor in tensors]
