"""The only module that touches PyTorch: pools for regions, and the checks that they are safe to use.

Why pools: PyTorch's cache serves a request from any free block of the pool that is current, with no call to
any allocator. With one pool for two tags, memory of one tag would be handed out under the other, and a pause
would take it away. So there is a `torch.cuda.MemPool` for every (tag, policy, device), in both hook modes; a
further one is made when the first is in use, because PyTorch lets a pool be current only once at a time.

PyTorch is used only if the program has imported it: a region without PyTorch is a matter of the library alone.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from . import _check, _hooks, _library, _older_torch, _registration, _sending
from ._errors import InactiveError, InvalidArgumentError, NoDriverError, UnsupportedError

OLDEST_TORCH = (2, 9)

# (tag, policy, device) for a region's pools; what is in front is up to the caller.
PoolKey = tuple[Any, ...]


def loaded_torch() -> Any | None:
    """PyTorch if the program has imported it (completely), else None."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "cuda") and hasattr(torch, "nn") else None


def cuda_in_use() -> Any | None:
    """PyTorch if it is imported and has initialised CUDA, else None."""
    torch = loaded_torch()
    return torch if torch is not None and torch.cuda.is_initialized() else None


def capturing() -> bool:
    """Whether the calling thread's current stream is capturing a graph."""
    torch = cuda_in_use()
    return torch is not None and bool(torch.cuda.is_current_stream_capturing())


def runtime(torch: Any) -> Any | None:
    """The CUDA runtime that PyTorch has loaded, with its C functions; None where it is linked in."""
    name = f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}"
    with suppress(OSError):
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    return None


# --- what cannot be served -------------------------------------------------------------------------------


def ready_torch() -> Any | None:
    """PyTorch with CUDA initialised, or None if it is not imported; raises if it cannot be served."""
    torch = loaded_torch()
    if torch is None:
        return None
    refuse_version(torch)
    if not torch.cuda.is_initialized():
        if _hooks.hook_mode() == "allocator" and not whole_process_pluggable(torch):
            become_allocator(torch)
        _initialize(torch)
    _older_torch.mend(torch)
    _registration.prepare()
    _sending.install(torch)
    if _check.wanted():
        _check.install(torch)
    return torch


def refuse_version(torch: Any) -> None:
    version = str(torch.__version__)
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_TORCH:
        raise UnsupportedError(
            f"PyTorch {version} cannot be served: Sire knows the allocators of "
            f"{OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} and newer. Install torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}."
        )
    if torch.version.cuda is None:
        raise UnsupportedError(
            f"PyTorch {version} is built without CUDA; Sire serves NVIDIA's CUDA builds. Install a CUDA wheel."
        )


def _initialize(torch: Any) -> None:
    try:
        torch.cuda.init()
        torch.cuda.current_device()
    except Exception as error:
        raise NoDriverError(
            f"PyTorch cannot use CUDA here, so a region has no device: {error}. 'sire doctor' says what was found."
        ) from error


def _spare_references(*filter_: object) -> None:
    """Called before a snapshot: PyTorch up to 2.11 gives away a reference to each element of the filter, unowned.

    Where that is mended a reference is left over, which keeps a few small numbers for ever.
    """
    for element in filter_:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(element))


# --- pools -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Pool:
    """A `torch.cuda.MemPool`, and whether its memory was seen to come from the library.

    ``mem_pool`` is for whoever has taken the pool from its shelf: `retire` drops it. ``identity`` stays.
    """

    mem_pool: Any
    device: int
    identity: tuple[int, int]
    verified: bool = False


@dataclass
class Shelf:
    """The pools of one key: those that no thread uses now, and all of them, so that they stay alive.

    Of pools that were retired, the ids: their tensors live on, new ones go elsewhere.
    """

    free: list[Pool] = field(default_factory=list)
    all: list[Pool] = field(default_factory=list)
    retired: list[tuple[int, int]] = field(default_factory=list)


_shelves: dict[PoolKey, Shelf] = {}
_shelves_lock = threading.Lock()
_active = threading.local()


def _active_keys() -> list[PoolKey]:
    keys: list[PoolKey] | None = getattr(_active, "keys", None)
    if keys is None:
        keys = _active.keys = []
    return keys


def _is_plain(key: PoolKey) -> bool:
    """Whether it stands for `unrouted`: what is opened within takes no tensors either."""
    return len(key) == 2


def is_routed() -> bool:
    """Whether a region's pool is current for the calling thread."""
    return bool(_active_keys())


@contextmanager
def routed(
    torch: Any, key: PoolKey, device: int | None, reused_is_changed: bool = False, whole: bool = False
) -> Iterator[None]:
    """The calling thread's tensors on one device go to a pool of ``key``.

    ``reused_is_changed``: the library takes backed-up bytes not to change, but PyTorch may have put new tensors into
    blocks of old ones, so that it is told. ``whole``: the pool's memory is not to be in pieces of PyTorch's.
    """
    index = device_index(torch, device)
    keys = _active_keys()
    key = (*key, index)
    _older_torch.refuse_in_capture(torch)
    if keys and (keys[-1] == key or _is_plain(keys[-1])):
        yield
        return
    pool = _take(torch, key, index)
    try:
        with ExitStack() as stack:
            if reused_is_changed:
                stack.enter_context(_telling_of_new_tensors(torch, pool))
            stack.enter_context(_current(torch, pool.mem_pool, index))
            keys.append(key)
            try:
                yield
            finally:
                keys.pop()
        _verify(torch, pool, whole)
    finally:
        with _shelves_lock:
            _shelves[key].free.append(pool)


def shelves() -> list[tuple[PoolKey, Shelf]]:
    """The pools of all regions."""
    with _shelves_lock:
        return list(_shelves.items())


def pools(shelf: Shelf) -> list[Pool]:
    """All pools of a shelf that are not retired; another thread may retire them at any moment."""
    with _shelves_lock:
        return list(shelf.all)


def identities(shelf: Shelf) -> list[tuple[int, int]]:
    """The ids of all pools of a shelf, those that were retired too."""
    with _shelves_lock:
        return [pool.identity for pool in shelf.all] + shelf.retired


def forget(shelf: Shelf, identity: tuple[int, int]) -> None:
    """Of a pool that was retired nothing lives any more."""
    with _shelves_lock:
        if identity in shelf.retired:
            shelf.retired.remove(identity)


def segments(torch: Any, identity: tuple[int, int]) -> list[dict[str, Any]]:
    """PyTorch's list of the segments of a pool, with their blocks."""
    _spare_references(*identity, False)
    options = {} if _older_torch.is_before_2_11(torch) else {"include_traces": False}
    found: list[dict[str, Any]] = torch.cuda.memory_snapshot(identity, **options)
    return found


def retire(torch: Any, key: PoolKey, pool: Pool) -> None:
    """Drops a pool: its free segments go back, its tensors live on, the next ones get a new pool.

    Nothing happens while a thread is inside its region, or if anybody else holds the pool, as PyTorch would end the
    process, or has retired it already.
    """
    with _shelves_lock:
        shelf = _shelves[key]
        # The count takes the lock of PyTorch's allocator, under which nobody wants this one.
        if pool not in shelf.free or pool.mem_pool.use_count() != 1:
            return
        shelf.free.remove(pool)
        shelf.all.remove(pool)
        shelf.retired.append(pool.identity)
    with _current_lock:
        dropped, pool.mem_pool = pool.mem_pool, None
        if not _may_drop_beside_others(torch):
            _retired.append(dropped)
        del dropped
        if _current_count == 0:
            _older_torch.drop_unused(_retired)


@contextmanager
def _telling_of_new_tensors(torch: Any, pool: Pool) -> Iterator[None]:
    """If anything was allocated inside, all of the pool counts as changed: which blocks are new is not known."""

    def allocated() -> int:
        return int(torch._C._cuda_memoryStats(pool.device)["allocation"]["all"]["allocated"])

    before = allocated()
    try:
        yield
    finally:
        if allocated() != before:
            library = _library.load()
            for segment in segments(torch, pool.identity):
                if library.owns(int(segment["address"])):
                    library.changed(int(segment["address"]), int(segment["total_size"]))


# Pools to be dropped when none is current, and how many are current now.
_retired: list[Any] = []
_current_count = 0
_current_lock = threading.Lock()


def _may_drop_beside_others(torch: Any) -> bool:
    """Whether a pool may be dropped while another is current: PyTorch 2.11 ends the process, 2.15 does not."""
    return not _older_torch.is_before_2_15(torch)


@contextmanager
def _current(torch: Any, mem_pool: Any, index: int) -> Iterator[None]:
    """Makes a pool current; when none is current any more, drops those that are to be."""
    global _current_count
    with _current_lock:
        _current_count += 1
    try:
        with torch.cuda.use_mem_pool(mem_pool, index):
            del mem_pool  # dropped below, if it is to be, and not when this function returns
            yield
    finally:
        with _current_lock:
            _current_count -= 1
            if _current_count == 0:
                _older_torch.drop_unused(_retired)


@contextmanager
def unrouted(torch: Any) -> Iterator[None]:
    """The calling thread's tensors go to plain pools that are dropped at the end; before 2.15, outside all regions.

    On the current device, and on all for which a region's pool is current.
    """
    _older_torch.refuse_in_capture(torch)
    devices = {int(torch.cuda.current_device()), *(key[-1] for key in _active_keys())}
    with ExitStack() as stack:
        for index in sorted(devices):
            stack.enter_context(_unrouted(torch, index))
        yield


@contextmanager
def _unrouted(torch: Any, index: int) -> Iterator[None]:
    keys = _active_keys()
    with _on_device(torch, index):
        pool = torch.cuda.MemPool()
    if not _may_drop_beside_others(torch):
        with _current_lock:
            _retired.append(pool)
    keys.append(("plain", index))
    try:
        with _current(torch, pool, index):
            del pool
            yield
    finally:
        keys.pop()


def _on_device(torch: Any, index: int) -> AbstractContextManager[None]:
    """What is made for the current device is made for this one."""
    if index == torch.cuda.current_device():
        return nullcontext()
    device: AbstractContextManager[None] = torch.cuda.device(index)
    return device


def device_index(torch: Any, device: object) -> int:
    """The ordinal of a device given as int, ``"cuda:1"``, `torch.device` or None (the current one)."""
    if device is None:
        return int(torch.cuda.current_device())
    try:
        described = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"{device!r} is not a device: {error}") from error
    if described.type != "cuda":
        raise InvalidArgumentError(f"a region is on a CUDA device, not on {described}")
    index = int(torch.cuda.current_device()) if described.index is None else int(described.index)
    count = int(torch.cuda.device_count())
    if index >= count:
        raise InvalidArgumentError(f"there is no cuda:{index}; this process sees {count} devices")
    return index


def _take(torch: Any, key: PoolKey, index: int) -> Pool:
    with _shelves_lock:
        shelf = _shelves.setdefault(key, Shelf())
        if shelf.free:
            return shelf.free.pop()
    pool = new_pool(torch, index)
    with _shelves_lock:
        shelf.all.append(pool)
    return pool


def new_pool(torch: Any, index: int) -> Pool:
    """A pool whose memory comes from the library."""
    with _on_device(torch, index):
        try:
            mem_pool = torch.cuda.MemPool(_allocator(torch))
            return Pool(mem_pool, index, tuple(mem_pool.id))
        except RuntimeError as error:
            if "expandable_segments" not in str(error):
                raise
            raise UnsupportedError(
                f"PyTorch {torch.__version__} makes no pool for a region: {error} Preload the library (sire run), "
                "start without expandable_segments:True, or install torch >= 2.11."
            ) from error


_pluggable: Any = None
_pluggable_lock = threading.Lock()


def _allocator(torch: Any) -> Any | None:
    """What a pool allocates with: PyTorch's own cudaMalloc (None), where that is hooked."""
    global _pluggable
    if _hooks.preloaded():
        return None
    with _pluggable_lock:
        if _pluggable is None:
            path = _library.load().path
            # Kept for ever: pools that outlive this module's state still free through it.
            _pluggable = torch.cuda.memory.CUDAPluggableAllocator(path, "sire_torch_pool_malloc", "sire_torch_free")
    return _pluggable.allocator()


def _verify(torch: Any, pool: Pool, whole: bool) -> None:
    """Raises if the pool got memory that did not come from the library. Asked until the answer is yes."""
    if pool.verified or _hooks.switched_off():
        return
    found = segments(torch, pool.identity)
    if not found:
        return
    library = _library.load()
    strangers = [each for each in found if not library.owns(int(each["address"]))]
    if strangers:
        raise InactiveError(
            f"tensors of this region were allocated at {strangers[0]['address']:#x} without Sire: pausing would "
            f"release nothing. {_why_stranger(strangers[0])}"
        )
    if whole and any(each.get("is_expandable") for each in found):
        raise UnsupportedError(
            "tensors of this region lie in expandable segments, which PyTorch makes of pieces: none of them is whole. "
            "Start without expandable_segments:True, or leave out whole=True."
        )
    pool.verified = True


def _why_stranger(segment: dict[str, Any]) -> str:
    if segment.get("is_expandable"):
        return (
            "They lie in an expandable segment, and PyTorch's way to the driver does not lead through Sire: preload "
            "the library first of all, or start without expandable_segments:True."
        )
    return "Another library answers cudaMalloc first; 'sire doctor' says which."


@dataclass(frozen=True)
class _GraphPool:
    pool: Pool
    key: PoolKey


# Pools of graphs, which live as long as a graph that has them, by the id that graph.pool() returns.
_own_pools: weakref.WeakValueDictionary[PoolKey, _GraphPool] = weakref.WeakValueDictionary()
# Those of graphs that share a handle of the program's, by that.
_shared_pools: weakref.WeakValueDictionary[PoolKey, _GraphPool] = weakref.WeakValueDictionary()


def pool_of_graph(torch: Any, graph: Any, pool: Any, key: PoolKey) -> Any:
    """The pool id into which a graph of this (tag, policy) is captured.

    With no ``pool``, the graph gets one of its own. Graphs that name the same ``pool`` share one of ours:
    PyTorch's handle itself would lead past the library in torch mode. A region's pool is never used: tensors
    made there later would take blocks that a replay writes.
    """
    index = int(torch.cuda.current_device())
    key = (*key, index)
    _drop_unused()
    graph.sire_pool = _graph_pool(torch, pool, key, index)
    return graph.sire_pool.pool.mem_pool.id


def leave_pool(graph: Any) -> None:
    """A graph that was reset needs its pool no more; it may be captured anew into another one."""
    if graph.__dict__.pop("sire_pool", None) is not None:
        _drop_unused()


def _drop_unused() -> None:
    """Drops what is to be dropped, unless a pool is current: then the last one that is does it."""
    with _current_lock:
        if _current_count == 0:
            _older_torch.drop_unused(_retired)


def _graph_pool(torch: Any, pool: Any, key: PoolKey, index: int) -> _GraphPool:
    if pool is None:
        return _new_graph_pool(torch, key, index)
    handle = tuple(getattr(pool, "id", pool))
    known = _own_pools.get(handle)
    if known is not None:
        if known.key != key:
            raise InvalidArgumentError(
                f"the pool {handle} belongs to a graph of {known.key}; one pool cannot serve {key} as well"
            )
        return known
    shared = _shared_pools.get((handle, *key))
    if shared is None:
        made = _new_graph_pool(torch, key, index)
        with _shelves_lock:
            shared = _shared_pools.setdefault((handle, *key), made)
    return shared


def _new_graph_pool(torch: Any, key: PoolKey, index: int) -> _GraphPool:
    own = _GraphPool(new_pool(torch, index), key)
    _older_torch.keep(torch, own, own.pool.mem_pool)
    _own_pools[own.pool.identity] = own
    return own


# --- the whole process -----------------------------------------------------------------------------------


def free_in_cache(torch: Any, device: int) -> int:
    """Bytes of a device that a cache holds and no tensor uses: PyTorch's, or ours where that took its place."""
    names = ("reserved_bytes", "active_bytes")
    if whole_process_pluggable(torch):
        counters = _library.load().memory_stats(device)
        reserved, active = (counters[f"{name}.all.current"] for name in names)
    else:
        # The counters themselves: PyTorch's functions make a table of a hundred of them first.
        stats = torch._C._cuda_memoryStats(device)
        reserved, active = (stats[name]["all"]["current"] for name in names)
    return max(0, int(reserved) - int(active))


def whole_process_pluggable(torch: Any) -> bool:
    """Whether PyTorch's allocator was replaced as a whole, so that there is no cache and no pool."""
    return bool(torch.cuda.memory.get_allocator_backend() == "pluggable")


_is_ours = False


def probe_pluggable(torch: Any) -> None:
    """Raises if the whole-process allocator is somebody else's: a region would do nothing. Asked until it is ours."""
    global _is_ours
    if _is_ours or _whole is not None:
        return
    pointer = torch.cuda.caching_allocator_alloc(512)
    try:
        ours = _library.load().owns(int(pointer))
    finally:
        torch.cuda.caching_allocator_delete(pointer)
    if not ours:
        raise UnsupportedError(
            "PyTorch's allocator was replaced by one that does not lead to Sire, and it offers no pools. "
            "Use sire.use_allocator(), or run under LD_PRELOAD=$(sire path)."
        )
    _is_ours = True


def become_allocator(torch: Any) -> None:
    """Makes the library PyTorch's only CUDA allocator, once."""
    global _whole
    with _pluggable_lock:
        if _whole is not None:
            return
        path = _library.load().path
        # A capture that the driver voids would count as under way for ever.
        _older_torch.mend(torch)
        allocator = torch.cuda.memory.CUDAPluggableAllocator(path, "sire_torch_malloc", "sire_torch_free")
        try:
            torch.cuda.memory.change_current_allocator(allocator)
        except RuntimeError as error:
            raise UnsupportedError(
                f"PyTorch does not accept another allocator any more: {error}. "
                "Call sire.use_allocator() once, before anything uses CUDA."
            ) from error
        _whole = allocator


_whole: Any = None
