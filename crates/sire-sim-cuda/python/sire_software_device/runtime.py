"""The stand-in's C functions as this package needs them: waiting for a stream, capture state, host nodes, range checks.

Every call goes through ctypes, which releases the interpreter lock, so that a stream's worker thread can run a Python
callback while another thread waits for it. Errors become the exception that PyTorch itself raises for the same status.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch

_SONAMES = ("libcudart.so.13", "libcudart.so.12")
_MARK = "sire_sim_check"
_CAPTURE_ACTIVE = 1
_UNSUPPORTED_IN_CAPTURE = 900

raw_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream


def find() -> ctypes.CDLL | None:
    """The loaded CUDA runtime if it is the stand-in; never loads one."""
    for soname in _SONAMES:
        try:
            library = ctypes.CDLL(soname, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
        if hasattr(library, _MARK):
            return library
    return None


class _Absent:
    """Stands where the library would be, so that importing this module without the stand-in is possible."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError("the software CUDA device is not loaded in this process")


_library: Any = find() or _Absent()
_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _function(name: str, *arguments: Any) -> Callable[..., int]:
    if isinstance(_library, _Absent):
        return lambda *_: 1
    function = getattr(_library, name)
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


_synchronize = _function("cudaStreamSynchronize", ctypes.c_void_p)
_is_capturing = _function("cudaStreamIsCapturing", ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
_launch_host = _function("cudaLaunchHostFunc", ctypes.c_void_p, _HostFunction, ctypes.c_void_p)
_check = _function(_MARK, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int)


def wait(device: int) -> None:
    """Wait for the work queued on the device's current stream, and for no other stream."""
    status = _synchronize(raw_stream(device))
    if status:
        fail(status, device)
    if _deferred:
        raise_deferred()


def check(pointer: int, length: int, device: int, write: bool) -> None:
    """Raise CUDA's illegal-address error unless the bytes are mapped and accessible."""
    status = _check(pointer, length, device, write)
    if status:
        fail(status, device)


def reachable(pointer: int, length: int, device: int, write: bool) -> bool:
    """`check` for a stream's worker thread, where nothing may be raised; the stand-in remembers the error."""
    return _check(pointer, length, device, write) == 0


def capturing(device: int) -> bool:
    """Whether the device's current stream is recording a graph."""
    status = ctypes.c_int(0)
    error = _is_capturing(raw_stream(device), ctypes.byref(status))
    if error:
        fail(error, device)
    return status.value >= _CAPTURE_ACTIVE


def fail(status: int, device: int) -> NoReturn:
    """Raise for a CUDA status what PyTorch raises: natively where the error is sticky, by its text otherwise."""
    torch.cuda.current_stream(device).synchronize()
    text = _function("cudaGetErrorString", ctypes.c_int)
    text.restype = ctypes.c_char_p  # type: ignore[attr-defined]
    message: Any = text(status)
    raise torch.AcceleratorError(f"CUDA error: {message.decode() if message else status}")


def refuse_in_capture(device: int, what: str) -> NoReturn:
    """Raise for an operation that needs results on the host while its stream is recording; the capture is spoilt, as on a GPU."""
    try:
        fail(_UNSUPPORTED_IN_CAPTURE, device)
    except torch.AcceleratorError as error:
        error.add_note(f"{what} needs the host to wait") if sys.version_info >= (3, 11) else None
        raise


# --- host functions: closures that a stream's worker thread runs, found by number ---

_numbers = itertools.count(1)
_closures: dict[int, Callable[[], None]] = {}
_deferred: list[BaseException] = []
_deferred_lock = threading.Lock()


def _run_closure(number: int | None) -> None:
    closure = _closures.get(number or 0)
    if closure is None:
        return
    try:
        closure()
    except BaseException as error:  # noqa: BLE001  a C callback must not let anything out; `wait` raises it later
        traceback.print_exc(file=sys.stderr)
        with _deferred_lock:
            _deferred.append(error)


_callback: Any = _HostFunction(_run_closure)


def raise_deferred() -> None:
    """Raise the first error that a host function met since the last call."""
    with _deferred_lock:
        errors = list(_deferred)
        _deferred.clear()
    if errors:
        raise RuntimeError(f"an operation replayed on the software CUDA device failed: {errors[0]}") from errors[0]


def launch(stream: int, closure: Callable[[], None]) -> int:
    """Queue (or, while the stream records, add to its graph) a closure; returns the number under which it is kept."""
    number = next(_numbers)
    _closures[number] = closure
    status = _launch_host(stream, _callback, number)
    if status:
        del _closures[number]
        fail(status, torch.cuda.current_device())
    return number


def launch_once(stream: int, closure: Callable[[], None]) -> None:
    """Queue a closure that is forgotten after it has run."""
    number = next(_numbers)

    def once() -> None:
        try:
            closure()
        finally:
            _closures.pop(number, None)

    _closures[number] = once
    status = _launch_host(stream, _callback, number)
    if status:
        del _closures[number]
        fail(status, torch.cuda.current_device())


def forget(numbers: list[int]) -> None:
    """Drop closures whose graph no longer exists."""
    for number in numbers:
        _closures.pop(number, None)


def kept() -> int:
    """How many closures are held: those of living graphs and those not yet run."""
    return len(_closures)
