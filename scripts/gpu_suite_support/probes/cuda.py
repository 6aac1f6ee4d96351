"""The CUDA driver through ctypes: the calls that the probes make, with arguments and results as Python values.

`Cuda.call` returns the driver's number and never raises: for most questions the number is the answer. The methods
that prepare something (`reserve`, `create`, ...) raise `CudaError`, because without them there is no question. Types
and numbers are those of the CUDA manual.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from typing import Any

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
NOT_READY = 600
READ, READ_WRITE = 1, 3
NON_BLOCKING = 1
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2

# cuDeviceGetAttribute
ATTRIBUTES = {
    "multiprocessors": 16,
    "pci_bus": 33,
    "async_engines": 40,
    "compute_major": 75,
    "compute_minor": 76,
    "virtual_memory_management": 102,
    "handle_posix_fd": 103,
    "gpu_direct_rdma_with_vmm": 110,
    "memory_pools": 115,
    "gpu_direct_rdma": 116,
    "handle_fabric": 128,
    "host_register": 99,
    "unified_addressing": 41,
    "pageable_memory_access": 88,
    "integrated": 18,
}


class CudaError(Exception):
    """A call that had to succeed did not."""


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("kind", c_int), ("id", c_int)]


class AllocationFlags(ctypes.Structure):
    """CUmemAllocationProp's allocFlags."""

    _fields_ = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("kind", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", AllocationFlags),
    ]


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", c_int)]


def properties(device: int = 0, *, rdma: bool = False, handle_types: int = 0) -> Properties:
    """Properties of pinned physical memory on `device`."""
    wanted = Properties(kind=1, handle_types=handle_types, location=Location(1, device))
    wanted.flags.rdma = int(rdma)
    return wanted


_u64, _ptr = c_uint64, c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(_ptr), c_int],
    "cuDevicePrimaryCtxGetState": [c_int, POINTER(c_uint), POINTER(c_int)],
    "cuCtxSetCurrent": [_ptr],
    "cuCtxGetCurrent": [POINTER(_ptr)],
    "cuCtxGetDevice": [POINTER(c_int)],
    "cuCtxSynchronize": [],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(Properties), c_int],
    "cuMemAddressReserve": [POINTER(_u64), c_size_t, c_size_t, _u64, c_ulonglong],
    "cuMemAddressFree": [_u64, c_size_t],
    "cuMemCreate": [POINTER(_u64), c_size_t, POINTER(Properties), c_ulonglong],
    "cuMemRelease": [_u64],
    "cuMemMap": [_u64, c_size_t, c_size_t, _u64, c_ulonglong],
    "cuMemUnmap": [_u64, c_size_t],
    "cuMemSetAccess": [_u64, c_size_t, POINTER(Access), c_size_t],
    "cuMemRetainAllocationHandle": [POINTER(_u64), _ptr],
    "cuMemAlloc_v2": [POINTER(_u64), c_size_t],
    "cuMemFree_v2": [_u64],
    "cuMemHostAlloc": [POINTER(_ptr), c_size_t, c_uint],
    "cuMemFreeHost": [_ptr],
    "cuMemHostRegister_v2": [_ptr, c_size_t, c_uint],
    "cuMemHostUnregister": [_ptr],
    "cuMemcpyHtoD_v2": [_u64, _ptr, c_size_t],
    "cuMemcpyDtoH_v2": [_ptr, _u64, c_size_t],
    "cuMemcpyHtoDAsync_v2": [_u64, _ptr, c_size_t, _ptr],
    "cuMemcpyDtoHAsync_v2": [_ptr, _u64, c_size_t, _ptr],
    "cuMemsetD8_v2": [_u64, ctypes.c_ubyte, c_size_t],
    "cuMemsetD8Async": [_u64, ctypes.c_ubyte, c_size_t, _ptr],
    "cuPointerGetAttribute": [_ptr, c_int, _u64],
    "cuMemGetAddressRange_v2": [POINTER(_u64), POINTER(c_size_t), _u64],
    "cuStreamCreate": [POINTER(_ptr), c_uint],
    "cuStreamSynchronize": [_ptr],
    "cuStreamQuery": [_ptr],
    "cuStreamBeginCapture_v2": [_ptr, c_int],
    "cuStreamEndCapture": [_ptr, POINTER(_ptr)],
    "cuStreamIsCapturing": [_ptr, POINTER(c_int)],
    "cuThreadExchangeStreamCaptureMode": [POINTER(c_int)],
    "cuEventCreate": [POINTER(_ptr), c_uint],
    "cuEventRecord": [_ptr, _ptr],
    "cuEventQuery": [_ptr],
    "cuEventSynchronize": [_ptr],
    "cuGraphInstantiateWithFlags": [POINTER(_ptr), _ptr, c_ulonglong],
    "cuGraphLaunch": [_ptr, _ptr],
    "cuGraphExecDestroy": [_ptr],
    "cuGraphDestroy": [_ptr],
    "cuModuleLoadData": [POINTER(_ptr), c_char_p],
    "cuModuleGetFunction": [POINTER(_ptr), _ptr, c_char_p],
    "cuLaunchKernel": [_ptr, *[c_uint] * 6, c_uint, _ptr, POINTER(_ptr), POINTER(_ptr)],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
}


class Cuda:
    """The driver, with the primary context of device 0 current unless `context=False`."""

    def __init__(self, driver: str, *, context: bool = True) -> None:
        self.library = ctypes.CDLL(driver, mode=ctypes.RTLD_GLOBAL)
        self.context: int | None = None
        self.need("cuInit", 0)
        if context:
            primary = c_void_p()
            self.need("cuDevicePrimaryCtxRetain", byref(primary), 0)
            self.need("cuCtxSetCurrent", primary)
            self.context = primary.value

    def call(self, name: str, *arguments: Any) -> int:
        """The driver's number; -1 if this driver has no such function."""
        function = getattr(self.library, name, None)
        if function is None:
            return -1
        function.argtypes, function.restype = _SIGNATURES[name], c_int
        return int(function(*arguments))

    def need(self, name: str, *arguments: Any) -> None:
        """A call without which the question cannot be asked."""
        code = self.call(name, *arguments)
        if code != 0:
            raise CudaError(f"{name}: {self.name(code)}")

    def name(self, code: int) -> str:
        """`CUDA_ERROR_... (number)`."""
        if code == -1:
            return "the driver has no such function"
        text = c_char_p()
        function = getattr(self.library, "cuGetErrorName", None)
        if function is None or function(c_int(code), byref(text)) != 0 or text.value is None:
            return f"error {code}"
        return f"{text.value.decode()} ({code})"

    def tell(self, name: str, *arguments: Any) -> str:
        """Calls, and returns the result's name."""
        return self.name(self.call(name, *arguments))

    # Memory

    def granularity(self, option: int = 0, wanted: Properties | None = None) -> int:
        """The granularity: minimum (0) or recommended (1)."""
        size = c_size_t()
        self.need("cuMemGetAllocationGranularity", byref(size), byref(wanted or properties()), option)
        return size.value

    def free_memory(self) -> int:
        """Free bytes of the device."""
        free, total = c_size_t(), c_size_t()
        self.need("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def total_memory(self) -> int:
        """All bytes of the device."""
        free, total = c_size_t(), c_size_t()
        self.need("cuMemGetInfo_v2", byref(free), byref(total))
        return total.value

    def attribute(self, name: str, device: int = 0) -> int | None:
        """A device attribute, None if the driver refuses it."""
        value = c_int()
        return value.value if self.call("cuDeviceGetAttribute", byref(value), ATTRIBUTES[name], device) == 0 else None

    def reserve(self, size: int) -> int:
        """A reservation."""
        address = _u64()
        self.need("cuMemAddressReserve", byref(address), size, 0, 0, 0)
        return address.value

    def create(self, size: int) -> int:
        """A physical on device 0."""
        handle = _u64()
        self.need("cuMemCreate", byref(handle), size, byref(properties()), 0)
        return handle.value

    def map(self, address: int, size: int, handle: int, *, access: bool = True) -> None:
        """Maps a physical, with access unless told otherwise."""
        self.need("cuMemMap", address, size, 0, handle, 0)
        if access:
            self.allow(address, size)

    def allow(self, address: int, size: int, flags: int = READ_WRITE) -> None:
        """Gives device 0 access."""
        self.need("cuMemSetAccess", address, size, byref(Access(Location(1, 0), flags)), 1)

    def mapped(self, size: int) -> tuple[int, int]:
        """A reservation with a physical mapped in it: `(address, handle)`."""
        address, handle = self.reserve(size), self.create(size)
        self.map(address, size, handle)
        return address, handle

    def host(self, size: int) -> int:
        """Pinned host memory."""
        pointer = c_void_p()
        self.need("cuMemHostAlloc", byref(pointer), size, 0)
        return int(pointer.value or 0)

    # Streams

    def stream(self) -> c_void_p:
        """A stream without order to the legacy default stream."""
        made = c_void_p()
        self.need("cuStreamCreate", byref(made), NON_BLOCKING)
        return made

    def read(self, address: int, size: int) -> bytes:
        """Device bytes."""
        buffer = ctypes.create_string_buffer(size)
        self.need("cuMemcpyDtoH_v2", ctypes.addressof(buffer), address, size)
        return buffer.raw
