"""CUDA graphs: operations recorded while a stream captures, and replayed by host nodes on the same addresses.

A recording belongs to the `torch.cuda.CUDAGraph` that captures; its closures live exactly as long as that graph, or until
the last replay in flight has ended. Random operations of a graph draw, at each replay, from the generators' state at that
replay, which then advances by what the graph uses.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from . import random, runtime

active = 0
"""How many captures are under way in the process; zero keeps eager operations from asking their stream."""

_recordings: dict[int, Recording] = {}
_lock = threading.Lock()


class Recording:
    """What one graph needs at replay: its closures and the random state of the replay that runs."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.draws: dict[torch.Generator, int] = {}
        self.state: dict[torch.Generator, tuple[int, int]] = {}
        self._in_flight = 0
        self._dead = False
        self._lock = threading.Lock()

    def add(self, stream: int, closure: Callable[[], None]) -> None:
        self.numbers.append(runtime.launch(stream, closure))

    def drawer(self, generator: torch.Generator) -> Callable[[], torch.Generator]:
        """A function for a closure that gives its CPU generator at each replay."""
        place = self.draws.get(generator, 0)
        self.draws[generator] = place + 1

        def at_replay() -> torch.Generator:
            seed, offset = self.state[generator]
            return random.cpu_generator(seed, offset + random.STEP * place)

        return at_replay

    def before_replay(self, stream: int) -> None:
        states = {generator: random.take(generator, count) for generator, count in self.draws.items()}
        with self._lock:
            self._in_flight += 1
        if states:
            runtime.launch_once(stream, lambda: self.state.update(states))

    def after_replay(self, stream: int) -> None:
        runtime.launch_once(stream, self._replayed)

    def _replayed(self) -> None:
        with self._lock:
            self._in_flight -= 1
        self._forget_if_unused()

    def retire(self) -> None:
        """The graph is gone; forget the closures once nothing that was launched needs them."""
        self._dead = True
        self._forget_if_unused()

    def _forget_if_unused(self) -> None:
        with self._lock:
            if not self._dead or self._in_flight:
                return
        runtime.forget(self.numbers)
        self.numbers = []


def _capture_id(stream: int) -> int:
    status = ctypes.c_int(0)
    number = ctypes.c_ulonglong(0)
    nothing = [ctypes.c_void_p(0)] * 4
    function: Any = runtime._library.cudaStreamGetCaptureInfo
    error = function(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), *nothing)
    if error:
        runtime.fail(error, torch.cuda.current_device())
    return number.value


def current(device: int) -> Recording:
    """The recording of the capture that the device's current stream takes part in."""
    number = _capture_id(runtime.raw_stream(device))
    with _lock:
        return _recordings.setdefault(number, Recording())


def recording(device: int) -> bool:
    """Whether an operation on this device's current stream must be recorded instead of run."""
    return active > 0 and runtime.capturing(device)


def _count(step: int) -> None:
    global active
    with _lock:
        active += step


def _end_previous(graph: Any) -> None:
    finalizer = graph.__dict__.pop("_software_device_finalizer", None)
    if finalizer is not None:
        finalizer()


def _patch(graph_type: Any) -> None:
    # newer releases end a capture in two steps; the first is the one that ends it
    end_name = "capture_end_pre" if hasattr(graph_type, "capture_end_pre") else "capture_end"
    begin, end, replay, reset = (getattr(graph_type, name) for name in ("capture_begin", end_name, "replay", "reset"))

    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        _end_previous(self)
        number = _capture_id(runtime.raw_stream(torch.cuda.current_device()))
        kept = Recording()
        with _lock:
            _recordings[number] = kept
        self._software_device_capture = (number, kept)
        self._software_device_finalizer = weakref.finalize(self, kept.retire)
        _count(1)

    def capture_end(self: Any) -> None:
        number, kept = self._software_device_capture
        try:
            end(self)
        except BaseException:
            _end_previous(self)
            raise
        finally:
            _count(-1)
            with _lock:
                _recordings.pop(number, None)

    def replay_(self: Any) -> None:
        _, kept = getattr(self, "_software_device_capture", (0, None))
        if kept is None:
            replay(self)
            return
        stream = runtime.raw_stream(torch.cuda.current_device())
        kept.before_replay(stream)
        try:
            replay(self)
        finally:
            kept.after_replay(stream)

    def reset_(self: Any) -> None:
        reset(self)
        _end_previous(self)
        self.__dict__.pop("_software_device_capture", None)

    for name, function, original in (
        ("capture_begin", capture_begin, begin),
        (end_name, capture_end, end),
        ("replay", replay_, replay),
        ("reset", reset_, reset),
    ):
        function.__doc__ = original.__doc__
        setattr(graph_type, name, function)


def install() -> None:
    """Let `torch.cuda.CUDAGraph` keep its recording."""
    _patch(torch.cuda.CUDAGraph)
