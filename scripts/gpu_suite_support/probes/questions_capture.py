"""Questions about graph capture: which calls are allowed while a stream captures, which spoil the capture, and replay
after a remap.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from ctypes import addressof, byref, c_char, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

from .ask import Bench, question
from .cuda import GLOBAL, MIB, READ_WRITE, RELAXED, THREAD_LOCAL, Access, Cuda, Location, properties

Verb = Callable[[], int]


class Stage:
    """Things prepared before a capture begins, so that each verb is a single call during it."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.size = cuda, cuda.granularity()
        self.stream, self.other = cuda.stream(), cuda.stream()
        self.event = c_void_p()
        cuda.need("cuEventCreate", byref(self.event), 2)
        cuda.need("cuEventRecord", self.event, self.other)
        self.target, _ = cuda.mapped(self.size)
        # Two pages of the system's: one that is to be registered, and one that is.
        self._memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        self.pages = addressof(c_char.from_buffer(self._memory))
        self.registered = self.pages + mmap.PAGESIZE
        cuda.need("cuCtxSynchronize")

    def verbs(self) -> dict[str, Verb]:
        """Fresh subjects for every verb."""
        cuda, size = self.cuda, self.size
        free, out = cuda.reserve(size), c_uint64()
        loose = cuda.create(size)
        unready = cuda.reserve(size)
        cuda.map(unready, size, cuda.create(size), access=False)
        mapped, _ = cuda.mapped(size)
        old, small = cuda.create(size), c_uint64()
        cuda.need("cuMemAlloc_v2", byref(small), 4096)
        made, number, count = c_void_p(), c_size_t(), c_size_t()
        host = cuda.host(4096)
        cuda.call("cuMemHostUnregister", self.pages)
        cuda.call("cuMemHostRegister_v2", self.registered, 4096, 1)
        return {
            "reserve": lambda: cuda.call("cuMemAddressReserve", byref(out), size, 0, 0, 0),
            "create": lambda: cuda.call("cuMemCreate", byref(out), size, byref(properties()), 0),
            "map": lambda: cuda.call("cuMemMap", free, size, 0, loose, 0),
            "set_access": lambda: cuda.call("cuMemSetAccess", unready, size, byref(Access(Location(1, 0), READ_WRITE)), 1),
            "unmap": lambda: cuda.call("cuMemUnmap", mapped, size),
            "release": lambda: cuda.call("cuMemRelease", old),
            "mem_get_info": lambda: cuda.call("cuMemGetInfo_v2", byref(number), byref(count)),
            "mem_alloc": lambda: cuda.call("cuMemAlloc_v2", byref(out), 4096),
            "mem_free": lambda: cuda.call("cuMemFree_v2", small.value),
            "stream_create": lambda: cuda.call("cuStreamCreate", byref(made), 1),
            "event_query": lambda: cuda.call("cuEventQuery", self.event),
            "copy_on_other_stream": lambda: cuda.call("cuMemcpyHtoDAsync_v2", self.target, host, 4096, self.other),
            "other_stream_synchronize": lambda: cuda.call("cuStreamSynchronize", self.other),
            "host_alloc": lambda: cuda.call("cuMemHostAlloc", byref(made), 4096, 0),
            "host_register": lambda: cuda.call("cuMemHostRegister_v2", self.pages, 4096, 1),
            "host_unregister": lambda: cuda.call("cuMemHostUnregister", self.registered),
            "event_record": lambda: cuda.call("cuEventRecord", self.event, self.other),
            "event_synchronize": lambda: cuda.call("cuEventSynchronize", self.event),
            "ctx_synchronize": lambda: cuda.call("cuCtxSynchronize"),
        }


def relaxed(cuda: Cuda, call: Verb) -> Verb:
    """The call as Sire makes its own: the calling thread's capture mode is relaxed meanwhile."""

    def calls() -> int:
        mode = c_int(RELAXED)
        cuda.need("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            return call()
        finally:
            cuda.need("cuThreadExchangeStreamCaptureMode", byref(mode))

    return calls


def _try(stage: Stage, mode: int, verb: str, *, other_thread: bool = False, as_sire: bool = False) -> dict[str, Any]:
    """One capture, one call in it."""
    cuda, call = stage.cuda, stage.verbs()[verb]
    call = relaxed(cuda, call) if as_sire else call
    cuda.need("cuStreamBeginCapture_v2", stage.stream, mode)
    cuda.tell("cuMemsetD8Async", stage.target, 1, stage.size, stage.stream)
    result = _elsewhere(cuda, call) if other_thread else call()
    status, graph = c_int(), c_void_p()
    cuda.call("cuStreamIsCapturing", stage.stream, byref(status))
    ended = cuda.call("cuStreamEndCapture", stage.stream, byref(graph))
    if graph.value:
        cuda.call("cuGraphDestroy", graph)
    return {
        "result": cuda.name(result),
        "allowed": result in (0, 600),
        "capture_survives": status.value == 1 and ended == 0,
        "end": cuda.name(ended),
    }


def _elsewhere(cuda: Cuda, call: Verb) -> int:
    found: list[int] = []

    def work() -> None:
        cuda.call("cuCtxSetCurrent", cuda.context)
        found.append(call())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def _all(bench: Bench, mode: int, *, other_thread: bool = False, as_sire: bool = False) -> dict[str, Any]:
    cuda = bench.cuda()
    stage = Stage(cuda)
    found = {verb: _try(stage, mode, verb, other_thread=other_thread, as_sire=as_sire) for verb in stage.verbs()}
    return {
        "answer": {
            "allowed": [verb for verb, seen in found.items() if seen["allowed"]],
            "spoil_the_capture": [verb for verb, seen in found.items() if not seen["capture_survives"]],
        },
        "verbs": found,
    }


@question("Which calls does a capture in global mode allow in the capturing thread, and which spoil it?")
def capture_global(bench: Bench) -> dict[str, Any]:
    return _all(bench, GLOBAL)


@question("Which calls does a capture in global mode allow in another thread, and which spoil it?")
def capture_global_other_thread(bench: Bench) -> dict[str, Any]:
    return _all(bench, GLOBAL, other_thread=True)


@question("Which calls does a capture in thread-local mode allow in the capturing thread, and which spoil it?")
def capture_thread_local(bench: Bench) -> dict[str, Any]:
    return _all(bench, THREAD_LOCAL)


@question("Which calls does a capture in thread-local mode allow in another thread, and which spoil it?")
def capture_thread_local_other_thread(bench: Bench) -> dict[str, Any]:
    return _all(bench, THREAD_LOCAL, other_thread=True)


@question("Which calls does a capture in relaxed mode allow, and which spoil it?")
def capture_relaxed(bench: Bench) -> dict[str, Any]:
    return _all(bench, RELAXED)


@question("Which calls does a capture in global mode allow in another thread whose own mode is relaxed, as Sire's is, and which spoil it?")
def capture_global_relaxed_thread(bench: Bench) -> dict[str, Any]:
    return _all(bench, GLOBAL, other_thread=True, as_sire=True)


@question("Which calls does a capture in global mode allow in the capturing thread while that thread's mode is relaxed, and which spoil it?")
def capture_global_relaxed_meanwhile(bench: Bench) -> dict[str, Any]:
    return _all(bench, GLOBAL, as_sire=True)


@question("Does a graph replay correctly after the physical memory under its addresses was replaced?")
def graph_replay_after_remap(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = 4 * MIB
    source, source_handle = cuda.mapped(size)
    target, target_handle = cuda.mapped(size)
    stream, graph, executable = cuda.stream(), c_void_p(), c_void_p()
    host = cuda.host(size)
    cuda.need("cuStreamBeginCapture_v2", stream, GLOBAL)
    cuda.need("cuMemsetD8Async", target, 0x5A, size // 2, stream)
    cuda.need("cuMemcpyDtoHAsync_v2", host, source, size, stream)
    cuda.need("cuStreamEndCapture", stream, byref(graph))
    cuda.need("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
    results = []
    for byte in (0x11, 0x22):
        cuda.need("cuMemsetD8_v2", source, byte, size)
        cuda.need("cuMemsetD8_v2", target, 0, size)
        cuda.need("cuCtxSynchronize")
        launched = cuda.tell("cuGraphLaunch", executable, stream)
        waited = cuda.tell("cuStreamSynchronize", stream)
        import ctypes

        right = ctypes.string_at(host, size) == bytes([byte]) * size
        right = right and cuda.read(target, size) == b"\x5a" * (size // 2) + bytes(size // 2)
        results.append({"launch": launched, "wait": waited, "right": right})
        for address, handle in ((source, source_handle), (target, target_handle)):
            cuda.need("cuMemUnmap", address, size)
            cuda.need("cuMemRelease", handle)
        source_handle, target_handle = cuda.create(size), cuda.create(size)
        cuda.map(source, size, source_handle)
        cuda.map(target, size, target_handle)
    return {"answer": results[1]["right"], "before": results[0], "after": results[1]}
