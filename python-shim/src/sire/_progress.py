"""Resumes that go on in the background: what can be used already, waiting for the rest, the order of coming back."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

from . import _library, _memory, _torch
from ._errors import BusyError, InvalidArgumentError
from ._report import Report

Ranges: TypeAlias = list[tuple[int, int]]

# One call into the library waits no longer, so that signal handlers run.
_SLICE_SECONDS = 0.1


class Progress:
    """A resume that goes on in the background. All methods may be called from any thread.

    Whoever uses memory that is not ready meets an illegal address, so wait for it first (`wait`), or have a stream
    wait (`wait_stream`); work that is given to the device after a `wait` sees the memory, on any stream. Nothing is
    ready before all memory of the call is there. If the call fails, waiting raises its exception, the tags are paused
    again, what was ready stays until the next pause or resume, and the call can be repeated. A `Progress` that is
    forgotten harms nothing: the resume goes on.
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
        span = _span(tensor, "wait")
        reached = _wait(partial(self._library.progress_wait, self._handle, *span), tensor, span, timeout)
        if reached and tensor is None:
            self.report()
        return reached

    def wait_stream(self, stream: Any = None, tensor: Any = None, timeout: float | None = None) -> bool:
        """Has a stream wait for the tensor, or, without one, for all that the resume brings back.

        What the stream is given from now on finds the bytes there. The caller waits only until all memory is there
        and the copies are queued, at most ``timeout`` seconds; False if it did not come to that. ``stream`` is a CUDA
        stream, or None for the current one, or a `torch.cuda.Event`: that is then recorded behind the bytes, so that
        whoever waits for it waits for them. For a stream that captures a graph the caller waits, as in `wait`.

        Raises what the resume failed with. If it fails later, what a stream was made to wait for stays. That the
        resume is over, so that its regions can be entered, is for `wait` and `report` to say; owners that registered
        with `sire.after_resume` are told by these, too.
        """
        if stream is not None and not hasattr(stream, "wait_stream") and not hasattr(stream, "record"):
            raise InvalidArgumentError(f"wait_stream takes a CUDA stream or event, not {type(stream).__name__}")
        torch = _torch.cuda_in_use()
        if torch is None:
            return self.wait(tensor, timeout)
        span = _span(tensor, "wait_stream")
        waiting, event = _waiting_stream(torch, stream, tensor)
        ask = partial(self._library.progress_wait_stream, self._handle, *span)
        queued = _wait(partial(ask, waiting.device.index, waiting.cuda_stream), tensor, span, timeout)
        if queued and event is not None:
            event.record(waiting)
        if queued and tensor is None:
            self.report()
        return queued

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
        """Inside, the current stream waits for each part's own parameters and buffers before the part runs.

        So a forward can begin while the last layers are on their way. A part that gives work to other streams
        lets them wait for the current one first, as for its inputs.
        """
        hooks = []
        try:
            for part in module.modules():
                if _own_tensors(part):
                    hooks.append(part.register_forward_pre_hook(lambda module, _inputs: self._wait_for(module)))
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _wait_for(self, module: Any) -> None:
        """For what a part has on a device when it runs: a program may have moved it since."""
        for tensor in _own_tensors(module):
            self.wait_stream(tensor=tensor)

    def __repr__(self) -> str:
        what = "everything" if self._tag is None else repr(self._tag)
        ready, total = self._library.progress_bytes(self._handle)
        return f"<sire progress of {what}: {ready} of {total} bytes>"


def _span(tensor: Any, asking: str) -> tuple[int, int]:
    """Where the tensor is; nowhere: everything."""
    return (0, 0) if tensor is None else _memory.span(tensor, asking)[0]


def _wait(ask: Callable[[float], bool], tensor: Any, span: tuple[int, int], timeout: float | None) -> bool:
    """Asks in slices until the answer is yes. A tensor without bytes need not be waited for."""
    if tensor is not None and not span[1]:
        return True
    end = time.monotonic() + _timeout(timeout)
    while True:
        left = max(end - time.monotonic(), 0.0)
        if ask(min(left, _SLICE_SECONDS)):
            return True
        if left <= _SLICE_SECONDS:
            return False


# One stream for each device that waits for nothing but resumes, for those who want an event.
_event_streams: dict[int, Any] = {}


def _waiting_stream(torch: Any, stream: Any, tensor: Any) -> tuple[Any, Any]:
    """The stream that is to wait, and the event that is to be recorded there then."""
    device = None if tensor is None else tensor.device
    if stream is None:
        return torch.cuda.current_stream(device), None
    if hasattr(stream, "cuda_stream"):
        return stream, None
    if not hasattr(stream, "record"):
        same = {"stream_id": stream.stream_id, "device_index": stream.device_index, "device_type": stream.device_type}
        return torch.cuda.Stream(**same), None
    index = _torch.device_index(torch, device or getattr(stream, "device", None))
    if index not in _event_streams:
        _event_streams.setdefault(index, torch.cuda.Stream(index))
    return _event_streams[index], stream


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

    def _add(self, module: Any) -> None:
        """What a part has on a device when it runs: a program may have moved it since."""
        for tensor in _own_tensors(module):
            pointer, size = _memory.span(tensor, "an order")[0]
            if size:
                self._seen[pointer] = max(size, self._seen.get(pointer, 0))

    def _watch(self, module: Any) -> None:
        for part in module.modules():
            if _own_tensors(part):
                self._hooks.append(part.register_forward_pre_hook(lambda module, _inputs: self._add(module)))
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
