"""Questions about the CUDA runtime beside the driver: what makes the primary context current, and what a context
costs.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from typing import Any

from .ask import Bench, question

_CALLS = (
    "nothing",
    "cudaGetDeviceCount",
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaMemGetInfo",
    "cudaMalloc",
    "cudaFree0",
    "cudaStreamCreate",
    "cudaDeviceSynchronize",
    "cudaHostAlloc",
    "cudaStreamIsCapturing",
)


@question("After which first runtime call is the primary context current (cuCtxGetDevice works)?")
def current_context(bench: Bench) -> dict[str, Any]:
    if not bench.runtime:
        return {"answer": None, "not_asked": "no CUDA runtime was found"}
    found = {call: _in_a_fork(bench, call) for call in _CALLS}
    return {"answer": [call for call, seen in found.items() if seen.get("ctx_get_device") == 0], "calls": found}


def _in_a_fork(bench: Bench, call: str) -> dict[str, Any]:
    """Runs one call in a child made before this process has touched CUDA."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            found = _first_call(bench, call)
        except BaseException as error:  # the child must end here whatever happens
            found = {"error": str(error)}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return dict(json.loads(text)) if text else {"error": "the process died"}


def _first_call(bench: Bench, call: str) -> dict[str, Any]:
    driver, runtime = (
        ctypes.CDLL(bench.driver, mode=ctypes.RTLD_GLOBAL),
        ctypes.CDLL(bench.runtime, mode=ctypes.RTLD_GLOBAL),
    )
    number, pointer, size, other = c_int(), c_void_p(), c_size_t(), c_size_t()
    calls: dict[str, Callable[[], int]] = {
        "nothing": lambda: driver.cuInit(0),
        "cudaGetDeviceCount": lambda: runtime.cudaGetDeviceCount(byref(number)),
        "cudaGetDevice": lambda: runtime.cudaGetDevice(byref(number)),
        "cudaSetDevice": lambda: runtime.cudaSetDevice(0),
        "cudaMemGetInfo": lambda: runtime.cudaMemGetInfo(byref(size), byref(other)),
        "cudaMalloc": lambda: runtime.cudaMalloc(byref(pointer), c_size_t(4096)),
        "cudaFree0": lambda: runtime.cudaFree(c_void_p(0)),
        "cudaStreamCreate": lambda: runtime.cudaStreamCreate(byref(pointer)),
        "cudaDeviceSynchronize": runtime.cudaDeviceSynchronize,
        "cudaHostAlloc": lambda: runtime.cudaHostAlloc(byref(pointer), c_size_t(4096), c_uint(0)),
        "cudaStreamIsCapturing": lambda: runtime.cudaStreamIsCapturing(c_void_p(0), byref(number)),
    }
    result = calls[call]()
    device, flags, active = c_int(-1), c_uint(), c_int(-1)
    return {
        "result": result,
        "ctx_get_device": driver.cuCtxGetDevice(byref(device)),
        "device": device.value,
        "primary_state": driver.cuDevicePrimaryCtxGetState(0, byref(flags), byref(active)),
        "primary_active": active.value,
    }


@question("How much device memory does a context take (memory not free on an idle device, seen from a fresh process)?")
def context_overhead(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    free, total = cuda.free_memory(), cuda.total_memory()
    return {
        "answer": total - free,
        "free": free,
        "total": total,
        "figures": [{"name": "context.overhead", "value": total - free, "unit": "B", "samples": 1}],
    }


@question("Which error does cudaMemcpy give for an unmapped reservation, and what does cudaGetLastError say after it?")
def runtime_copy_unmapped(bench: Bench) -> dict[str, Any]:
    if not bench.runtime:
        return {"answer": None, "not_asked": "no CUDA runtime was found"}
    cuda = bench.cuda()
    runtime = ctypes.CDLL(bench.runtime, mode=ctypes.RTLD_GLOBAL)
    runtime.cudaMemcpy.argtypes = [c_void_p, c_void_p, c_size_t, c_int]
    address = cuda.reserve(cuda.granularity())
    buffer = ctypes.create_string_buffer(4096)
    codes = {
        "copy": runtime.cudaMemcpy(address, ctypes.addressof(buffer), 4096, 1),
        "last_error": runtime.cudaGetLastError(),
        "last_error_again": runtime.cudaGetLastError(),
        "synchronize": runtime.cudaDeviceSynchronize(),
    }
    return {"answer": codes["copy"], "codes": codes, "sticky": codes["synchronize"] != 0}


@question("Do the runtime's cudaMemcpyAsync (from pageable memory) and cudaMemset work on memory that cuMemMap mapped?")
def runtime_on_vmm(bench: Bench) -> dict[str, Any]:
    if not bench.runtime:
        return {"answer": None, "not_asked": "no CUDA runtime was found"}
    cuda = bench.cuda()
    runtime = ctypes.CDLL(bench.runtime, mode=ctypes.RTLD_GLOBAL)
    runtime.cudaMemcpyAsync.argtypes = [c_void_p, c_void_p, c_size_t, c_int, c_void_p]
    runtime.cudaMemset.argtypes = [c_void_p, c_int, c_size_t]
    size = cuda.granularity()
    address, _ = cuda.mapped(size)
    buffer = ctypes.create_string_buffer(b"\x33" * 4096, 4096)
    copied = runtime.cudaMemcpyAsync(address, ctypes.addressof(buffer), 4096, 1, None)
    waited = runtime.cudaDeviceSynchronize()
    right = cuda.read(address, 4096) == b"\x33" * 4096
    filled = runtime.cudaMemset(address, 0x44, size)
    right = right and runtime.cudaDeviceSynchronize() == 0 and cuda.read(address, size) == b"\x44" * size
    return {"answer": right, "codes": {"copy": copied, "wait": waited, "fill": filled}}
