"""Questions about reservations, physicals and mappings: what may be mapped, unmapped and accessed how, and what
becomes of memory.
"""

from __future__ import annotations

import ctypes
import time
from ctypes import byref, c_int, c_size_t, c_uint64
from typing import Any

from .ask import Bench, question
from .cuda import ATTRIBUTES, MIB, READ, READ_WRITE, Access, Cuda, Location, properties
from .kernels import Kernels, keep_busy


@question("What are the minimum and the recommended granularity, with and without an exportable handle and RDMA?")
def granularity(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    plain = {"minimum": cuda.granularity(0), "recommended": cuda.granularity(1)}
    posix = cuda.granularity(0, properties(handle_types=1))
    rdma = cuda.granularity(0, properties(rdma=True)) if cuda.attribute("gpu_direct_rdma_with_vmm") else None
    return {"answer": plain["minimum"], **plain, "minimum_posix_fd": posix, "minimum_rdma": rdma}


@question("Which of the attributes that Sire reads does the device report, and does a physical with the RDMA flag work?")
def attributes(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    found = {name: cuda.attribute(name) for name in ATTRIBUTES}
    lives = {flag: _life(cuda, rdma=flag == "with_rdma_flag") for flag in ("without_rdma_flag", "with_rdma_flag")}
    return {"answer": found["gpu_direct_rdma_with_vmm"], "attributes": found, **lives}


def _life(cuda: Cuda, *, rdma: bool) -> dict[str, str]:
    """What each call says in the life of a physical. Others saw access refused to memory that was made and mapped."""
    size, handle = cuda.granularity(), c_uint64()
    place = cuda.reserve(size)
    return {
        "create": cuda.tell("cuMemCreate", byref(handle), size, byref(properties(rdma=rdma)), 0),
        "map": cuda.tell("cuMemMap", place, size, 0, handle.value, 0),
        "access": cuda.tell("cuMemSetAccess", place, size, byref(Access(Location(1, 0), READ_WRITE)), 1),
        "fill": cuda.tell("cuMemsetD8_v2", place, 1, size),
        "wait": cuda.tell("cuCtxSynchronize"),
        "unmap": cuda.tell("cuMemUnmap", place, size),
        "release": cuda.tell("cuMemRelease", handle.value),
    }


@question("Does cuMemUnmap wait for work that runs on the device, on the same mapping or on another?")
def unmap_waits(bench: Bench) -> dict[str, Any]:
    cuda, seconds = bench.cuda(), 0.3
    size = (64 if bench.big else 8) * MIB
    kernels, stream = Kernels.load(cuda), cuda.stream()
    busy, _ = cuda.mapped(size)
    other, other_handle = cuda.mapped(size)
    work = keep_busy(cuda, kernels, stream, seconds, busy, size)
    elsewhere = _timed_unmap(cuda, other, size)
    running_after_other = cuda.tell("cuStreamQuery", stream)
    cuda.tell("cuStreamSynchronize", stream)
    cuda.tell("cuMemRelease", other_handle)
    # Now the mapping that the queued work will touch last.
    keep_busy(cuda, kernels, stream, seconds, busy, size)
    if kernels is not None:
        kernels.store(stream, busy, 7)
    same = _timed_unmap(cuda, busy, size)
    afterwards = cuda.tell("cuCtxSynchronize")
    return {
        "answer": {"other_mapping": elsewhere["seconds"] > seconds / 2, "same_mapping": same["seconds"] > seconds / 2},
        "work": work,
        "other_mapping": elsewhere,
        "stream_after_other": running_after_other,
        "same_mapping": same,
        "synchronize_afterwards": afterwards,
    }


def _timed_unmap(cuda: Cuda, address: int, size: int) -> dict[str, Any]:
    start = time.monotonic()
    result = cuda.tell("cuMemUnmap", address, size)
    return {"result": result, "seconds": time.monotonic() - start}


def _health(cuda: Cuda) -> dict[str, str]:
    """Whether the context still works: an error that is sticky shows in all of these."""
    size = cuda.granularity()
    made = c_uint64()
    return {
        "synchronize": cuda.tell("cuCtxSynchronize"),
        "create": cuda.tell("cuMemCreate", byref(made), size, byref(properties()), 0),
        "allocate": cuda.tell("cuMemAlloc_v2", byref(made), 4096),
    }


def _reserved_only(cuda: Cuda) -> tuple[int, int]:
    size = cuda.granularity()
    return cuda.reserve(size), size


@question("Which error does a copy from host memory to an unmapped reservation give, and is it sticky?")
def host_copy_unmapped(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    address, _ = _reserved_only(cuda)
    buffer = ctypes.create_string_buffer(4096)
    host = ctypes.addressof(buffer)
    to_device, to_host = (
        cuda.tell("cuMemcpyHtoD_v2", address, host, 4096),
        cuda.tell("cuMemcpyDtoH_v2", host, address, 4096),
    )
    health = _health(cuda)
    return {
        "answer": {"error": to_device, "sticky": not health["synchronize"].endswith("(0)")},
        "to_device": to_device,
        "to_host": to_host,
        "afterwards": health,
    }


@question("Which error does an asynchronous copy from pinned memory to an unmapped reservation give, when, and is it sticky?")
def async_copy_unmapped(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    address, size = _reserved_only(cuda)
    stream, host = cuda.stream(), cuda.host(size)
    submitted = cuda.tell("cuMemcpyHtoDAsync_v2", address, host, size, stream)
    waited = cuda.tell("cuStreamSynchronize", stream)
    health = _health(cuda)
    return {
        "answer": {"submitted": submitted, "waited": waited, "sticky": not health["synchronize"].endswith("(0)")},
        "afterwards": health,
    }


@question("Which error does a fill of an unmapped reservation give, when, and is it sticky?")
def fill_unmapped(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    address, size = _reserved_only(cuda)
    stream = cuda.stream()
    submitted = cuda.tell("cuMemsetD8Async", address, 1, size, stream)
    waited = cuda.tell("cuStreamSynchronize", stream)
    health = _health(cuda)
    return {
        "answer": {"submitted": submitted, "waited": waited, "sticky": not health["synchronize"].endswith("(0)")},
        "afterwards": health,
    }


@question("Which error does a kernel that writes to an unmapped reservation give, and what still works after it?")
def kernel_unmapped(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    kernels = Kernels.load(cuda)
    if kernels is None:
        return {"answer": None, "not_asked": "this device runs no PTX"}
    address, size = _reserved_only(cuda)
    mapped, handle = cuda.mapped(size)
    stream = cuda.stream()
    launched = cuda.name(kernels.store(stream, address, 7))
    waited = cuda.tell("cuStreamSynchronize", stream)
    after = _health(cuda) | {
        "unmap": cuda.tell("cuMemUnmap", mapped, size),
        "release": cuda.tell("cuMemRelease", handle),
    }
    return {"answer": waited, "launched": launched, "afterwards": after}


@question("May one cuMemSetAccess span several mappings, and one cuMemUnmap?")
def spanning_calls(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = cuda.granularity()
    address = cuda.reserve(4 * size)
    for index in range(4):
        cuda.map(address + index * size, size, cuda.create(size), access=False)
    access = cuda.tell("cuMemSetAccess", address, 4 * size, byref(Access(Location(1, 0), READ_WRITE)), 1)
    usable = cuda.tell("cuMemsetD8_v2", address, 1, 4 * size)
    return {"answer": {"set_access": access, "unmap": cuda.tell("cuMemUnmap", address, 4 * size)}, "usable": usable}


@question("What does unmapping a part of a mapping say, and does it change anything? A map at an offset that is not 0?")
def partial_calls(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = cuda.granularity()
    address, _ = cuda.mapped(4 * size)
    part = cuda.tell("cuMemUnmap", address, size)
    intact = cuda.tell("cuMemsetD8_v2", address, 1, 4 * size)
    elsewhere = cuda.reserve(size)
    offset = cuda.tell("cuMemMap", elsewhere, size, size, cuda.create(4 * size), 0)
    twice = cuda.tell("cuMemMap", address, size, 0, cuda.create(size), 0)
    return {"answer": {"unmap_part": part, "map_at_offset": offset, "map_over_mapping": twice}, "still_usable": intact}


@question("Which error does touching a mapping before cuMemSetAccess give, and is it sticky?")
def no_access_yet(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = cuda.granularity()
    address = cuda.reserve(size)
    cuda.map(address, size, cuda.create(size), access=False)
    buffer = ctypes.create_string_buffer(64)
    before = cuda.tell("cuMemcpyDtoH_v2", ctypes.addressof(buffer), address, 64)
    health = _health(cuda)
    return {"answer": {"error": before, "sticky": not health["synchronize"].endswith("(0)")}, "afterwards": health}


@question("Does the device accept read-only access, and which error does a write then give?")
def read_only_access(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = cuda.granularity()
    address = cuda.reserve(size)
    cuda.map(address, size, cuda.create(size), access=False)
    set_access = cuda.tell("cuMemSetAccess", address, size, byref(Access(Location(1, 0), READ)), 1)
    buffer = ctypes.create_string_buffer(64)
    read = cuda.tell("cuMemcpyDtoH_v2", ctypes.addressof(buffer), address, 64)
    write = cuda.tell("cuMemcpyHtoD_v2", address, ctypes.addressof(buffer), 64)
    return {"answer": {"set_access": set_access, "read": read, "write": write}, "afterwards": _health(cuda)}


@question("What does fresh physical memory contain, when the same process has just released memory full of a pattern?")
def fresh_memory(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = 64 * MIB
    address, handle = cuda.mapped(size)
    cuda.need("cuMemsetD8_v2", address, 0xAB, size)
    cuda.need("cuCtxSynchronize")
    cuda.need("cuMemUnmap", address, size)
    cuda.need("cuMemRelease", handle)
    cuda.map(address, size, cuda.create(size))
    found = cuda.read(address, size)
    counts = {"zero": found.count(0), "pattern": found.count(0xAB)}
    kind = "zero" if counts["zero"] == size else "the old content" if counts["pattern"] == size else "other"
    return {"answer": kind, "bytes": size, **counts, "first": found[:16].hex()}


@question(
    "Does a handle retained by cuMemRetainAllocationHandle keep the memory after unmap and release, and is free memory back at once when it goes?"
)
def retained_handle(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = 64 * MIB
    address, handle = cuda.mapped(size)
    retained = c_uint64()
    cuda.need("cuMemRetainAllocationHandle", byref(retained), address)
    held = cuda.free_memory()
    cuda.need("cuMemUnmap", address, size)
    cuda.need("cuMemRelease", handle)
    after_release = cuda.free_memory()
    cuda.need("cuMemRelease", retained.value)
    start = time.monotonic()
    after_last = cuda.free_memory()
    while after_last < held + size and time.monotonic() - start < 1.0:
        time.sleep(0.002)
        after_last = cuda.free_memory()
    return {
        "answer": {"kept": after_release < held + size, "same_value": retained.value == handle},
        "seconds_until_free": time.monotonic() - start,
        "given_back": after_last - held,
        "bytes": size,
    }


@question("What do pointer attributes say of a mapped and of an unmapped reservation?")
def pointer_attributes(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = cuda.granularity()
    address, _ = cuda.mapped(size)
    mapped = _attributes_of(cuda, address)
    cuda.need("cuMemUnmap", address, size)
    unmapped = _attributes_of(cuda, address)
    # Libraries that register memory for RDMA ask how far the allocation goes.
    both = cuda.reserve(2 * size)
    for at in (both, both + size):
        cuda.map(at, size, cuda.create(size))
    start, length = c_uint64(), c_size_t()
    asked = cuda.tell("cuMemGetAddressRange_v2", byref(start), byref(length), both + size)
    return {
        "answer": {"mapped": mapped["mapped"], "unmapped": unmapped["mapped"]},
        "mapped": mapped,
        "unmapped": unmapped,
        "second_of_two_side_by_side": _attributes_of(cuda, both + size),
        "its_address_range": {"result": asked, "offset": start.value - both, "size": length.value},
    }


def _attributes_of(cuda: Cuda, address: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, number in {
        "memory_type": 2,
        "device": 9,
        "legacy_ipc": 10,
        "range_start": 11,
        "range_size": 12,
        "mapped": 13,
    }.items():
        value = c_uint64()
        code = cuda.call("cuPointerGetAttribute", byref(value), number, address)
        found[name] = value.value if code == 0 else cuda.name(code)
    return found


@question("Which virtual-memory calls work in a thread that has no current context?")
def without_context(bench: Bench) -> dict[str, Any]:
    cuda = bench.cuda()
    size = cuda.granularity()
    cuda.need("cuCtxSetCurrent", None)
    address, handle, found = c_uint64(), c_uint64(), {}
    found["reserve"] = cuda.tell("cuMemAddressReserve", byref(address), size, 0, 0, 0)
    found["create"] = cuda.tell("cuMemCreate", byref(handle), size, byref(properties()), 0)
    found["map"] = cuda.tell("cuMemMap", address, size, 0, handle, 0)
    found["set_access"] = cuda.tell("cuMemSetAccess", address, size, byref(Access(Location(1, 0), READ_WRITE)), 1)
    found["fill"] = cuda.tell("cuMemsetD8_v2", address, 0, size)
    found["unmap"] = cuda.tell("cuMemUnmap", address, size)
    found["release"] = cuda.tell("cuMemRelease", handle)
    found["address_free"] = cuda.tell("cuMemAddressFree", address, size)
    device = c_int()
    found["ctx_get_device"] = cuda.tell("cuCtxGetDevice", byref(device))
    return {"answer": {verb: result.endswith("(0)") for verb, result in found.items()}, "results": found}
