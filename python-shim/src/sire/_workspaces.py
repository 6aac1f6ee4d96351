"""Memory that PyTorch takes once and keeps for the process: it is taken before a region or a capture begins, outside.

Before 2.15, each cuBLAS handle (a thread's, of a device) gets a workspace per stream at the first matrix product there,
out of the pool that is current; and a generator gets the tensors that all graphs' random numbers start from when its
first graph is captured. In a region's pool, or a graph's, they would go with a pause of it, and every later product,
or every other graph, would write to memory that is away.

To clear the workspaces afterwards instead would take them from graphs that the program has captured with them. So
what is not made here (a product on a stream that the thread first uses inside a region) stays where it was made.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from . import _hooks, _library, _older_torch, _torch

# (device, stream, whether backward's thread has one, how often PyTorch was told to forget all of them).
_Made = tuple[int, int, bool, int]

# Seconds after which what failed is tried again: where memory is short, PyTorch first gives up all that it can.
_AGAIN = 10.0
_RELAXED = 2


class _OfThread(threading.local):
    """What the calling thread's handles have: until when there is nothing to make (`time.monotonic`)."""

    def __init__(self) -> None:
        self.nothing_until: dict[_Made, float] = {}


_of_thread = _OfThread()
# Where the blocks are that were made so.
_blocks: set[int] = set()
_forgotten = 0
_forgets: Callable[[], None] | None = None
# Graphs that are never captured; as long as a generator knows one it keeps its tensors. By device.
_keepers: dict[int, Any] = {}
_keeping = threading.Lock()


def make_for_region(torch: Any, device: int) -> None:
    """Makes the workspaces of the calling thread on the current stream of a device, where PyTorch would keep them."""
    if _are_kept(torch):
        _make(torch, device, torch.cuda.current_stream(device), backward=False)


def make_for_capture(torch: Any, stream: Any) -> None:
    """Makes what a capture on ``stream`` would keep: workspaces, also of backward's thread, and the generator's."""
    device = int(torch.cuda.current_device())
    if _are_kept(torch):
        _make(torch, device, stream, backward=True)
    if _older_torch.is_before_2_13(torch):
        _keep_generators_tensors(torch, device)


def _are_kept(torch: Any) -> bool:
    return _older_torch.is_before_2_15(torch) or os.environ.get("TORCH_CUBLAS_WORKSPACE_CACHE") == "1"


def _make(torch: Any, device: int, stream: Any, backward: bool) -> None:
    made = (device, int(stream.cuda_stream), backward, _forgotten)
    if _of_thread.nothing_until.get(made, -math.inf) > time.monotonic():
        return
    _hear_of_forgetting(torch)
    # Where memory is short, or cuBLAS is not there, the program's own product will say so.
    with suppress(RuntimeError), torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return
        _of_thread.nothing_until[made] = time.monotonic() + _AGAIN
        with torch.cuda.stream(stream), outside(torch), _noted(torch), _aside(torch):
            _multiply(torch, backward)
        _of_thread.nothing_until[made] = math.inf


def holds(segment: dict[str, Any]) -> bool:
    """Whether nothing is in use in a segment of PyTorch's but what was made here."""
    return _in_use([segment]) <= _blocks


@contextmanager
def _noted(torch: Any) -> Iterator[None]:
    """What stays of what is made inside is remembered, where all of a process's memory may have to make room."""
    if not _hooks.preloaded():
        yield
        return
    before = _in_use(_torch.segments(torch, (0, 0)))
    yield
    _blocks.update(_in_use(_torch.segments(torch, (0, 0))) - before)


def _in_use(segments: list[dict[str, Any]]) -> set[int]:
    found = set()
    for segment in segments:
        at = int(segment["address"])
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                found.add(at)
            at += int(block["size"])
    return found


def _multiply(torch: Any, backward: bool) -> None:
    """cuBLAS's workspace comes with the handle, cuBLASLt's with a product that has a bias; backward has its thread."""
    left = torch.ones(16, 16, dtype=torch.float16, device="cuda", requires_grad=backward)
    # Behind the first kernel: a thread without a context gets one with that.
    torch.cuda.current_blas_handle()
    with torch.no_grad():
        torch.addmm(left[0], left, left)
    if not backward:
        return

    def multiply_there(gradient: Any) -> Any:
        with _relaxed(torch):
            factor = gradient.clone()
            torch.cuda.current_blas_handle()
            return factor @ factor

    # Nothing is saved for this backward pass: hooks of the program would see it.
    product = left.clone()
    product.register_hook(multiply_there)
    torch.autograd.grad(product.sum(), left)


@contextmanager
def _aside(torch: Any) -> Iterator[None]:
    """What is computed inside is none of the program's: its modes do not see it, and do not change what it is."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode_temporarily

    # In PyTorch 2.9 the stack's own reference ends with its popping: a mode that nobody else has would be freed.
    modes = _get_current_dispatch_mode_stack()
    with ExitStack() as stack:
        for each in (
            torch._C.DisableTorchFunction(),
            _relaxed(torch),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
            temporarily_clear_interpreter_stack(),
        ):
            stack.enter_context(each)
        for _ in modes:
            stack.enter_context(_pop_mode_temporarily())
        yield


@contextmanager
def _relaxed(torch: Any) -> Iterator[None]:
    """A capture of another thread is not voided by what is called inside."""
    exchange = getattr(_torch.runtime(torch), "cudaThreadExchangeStreamCaptureMode", None)
    mode = ctypes.c_int(_RELAXED)
    if exchange is None or exchange(ctypes.byref(mode)) != 0:
        yield
        return
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def _hear_of_forgetting(torch: Any) -> None:
    """PyTorch's compiler clears all workspaces around its own graphs: then they are made again."""
    global _forgets
    with _keeping:
        if _forgets is not None:
            return
        _forgets = torch._C._cuda_clearCublasWorkspaces

    def forget() -> None:
        global _forgotten
        _forgotten += 1
        _forgets()

    torch._C._cuda_clearCublasWorkspaces = forget


def _keep_generators_tensors(torch: Any, device: int) -> None:
    with _keeping:
        if device in _keepers:
            return
        keeper = torch.cuda.CUDAGraph()
        # Tensors that were made in inference mode could be written to in inference mode only.
        with outside(torch), _noted(torch), _aside(torch):
            keeper.register_generator_state(torch.cuda.default_generators[device])
        _keepers[device] = keeper


@contextmanager
def room_outside(torch: Any, stream: Any) -> Iterator[None]:
    """A capture's small tensors that PyTorch keeps out of its pool (generators' from 2.13 on) find a segment there.

    A new one would be asked for while the thread is in the graph's region; and inside another region, their pool would
    be that one's.
    """
    routed = _torch.is_routed()
    if routed and _older_torch.is_before_2_13(torch):
        yield
        return
    with _torch.unrouted(torch) if routed else nullcontext():
        held = _small_tensors(torch, stream)
        try:
            yield
        finally:
            held.clear()


def _small_tensors(torch: Any, stream: Any) -> list[Any]:
    """On each stream that such tensors are for. Generators' are for the default one, whichever is current."""
    held = []
    with suspended(), _aside(torch):
        for each in (torch.cuda.default_stream(), torch.cuda.current_stream(), stream):
            with torch.cuda.stream(each):
                held.append(torch.empty(1, device="cuda"))
    return held


@contextmanager
def outside(torch: Any) -> Iterator[None]:
    """What the calling thread allocates is in no region, and in no region's pool."""
    with suspended(), _torch.unrouted(torch) if _torch.is_routed() else nullcontext():
        yield


@contextmanager
def suspended() -> Iterator[None]:
    """What the calling thread asks the driver for is in no region."""
    library = _library.load()
    library.region_suspend()
    try:
        yield
    finally:
        library.region_unsuspend()
