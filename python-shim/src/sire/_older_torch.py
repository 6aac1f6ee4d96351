"""What older PyTorch does otherwise, mended where regions build on it. Nothing here is used with 2.15.

Before 2.11, a thread's tensors come from the pool that was made current *first*, also where another was made current
inside: an inner region's tensors would be the outer one's, and those of a graph's capture the region's around it. Here
the outer pool steps back until the inner one, or the capture, has ended. What cannot be mended is a pool inside a
capture: PyTorch ignores it, so regions refuse to begin there. And a pool that is dropped while a graph lives that was
captured into it ends the process.

Before 2.15, to drop a pool while any is current, in any thread, ends the process: pools that are current, and
captures, are counted here, the program's own included, and a graph's pool is kept until nobody else holds it and none
is current. A capture that the driver voided leaves its pool current for ever: such a capture's pool is put down.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ._errors import UnsupportedError


def is_before_2_11(torch: Any) -> bool:
    """Whether pools of this PyTorch are in the old order."""
    return _is_before(torch, (2, 11))


def is_before_2_13(torch: Any) -> bool:
    """Whether a generator has one set of tensors for all graphs; later each graph has its own."""
    return _is_before(torch, (2, 13))


def is_before_2_15(torch: Any) -> bool:
    """Whether no pool of this PyTorch may be dropped while another one is current."""
    return _is_before(torch, (2, 15))


def _is_before(torch: Any, first: tuple[int, int]) -> bool:
    version = _version(str(torch.__version__))
    return version is not None and version < first


@functools.cache
def _version(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]))


def refuse_in_capture(torch: Any) -> None:
    """Raises where PyTorch would ignore a pool."""
    if is_before_2_11(torch) and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"PyTorch {torch.__version__} takes all memory of a graph capture from the graph's own pool, so a region "
            "that begins inside would hold nothing. Capture the whole graph with sire.cuda_graph(...), or install "
            "torch >= 2.11."
        )


# --- the order of pools ----------------------------------------------------------------------------------

# A device and a pool's id.
_Place = tuple[int, tuple[int, int]]


class _Current(threading.local):
    """The calling thread's pools, outermost first; only the last one of a device is PyTorch's."""

    def __init__(self) -> None:
        self.places: list[_Place] = []

    def last_of(self, device: int) -> _Place | None:
        return next((place for place in reversed(self.places) if place[0] == device), None)

    def last_of_each(self) -> list[_Place]:
        return list({place[0]: place for place in self.places}.values())


_current = _Current()


class _Underway:
    """The pools of all threads that are current, or captured into, and how often."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counts: Counter[_Place] = Counter()

    def begins(self, place: _Place) -> None:
        """Called before PyTorch is, so that nothing is dropped meanwhile."""
        with self._lock:
            self._counts[place] += 1

    def ended(self, place: _Place) -> None:
        """Of what did not begin here, nothing is known."""
        with self._lock:
            self._counts -= Counter([place])

    def is_once(self, place: _Place) -> bool:
        """Whether it is current for one only."""
        with self._lock:
            return self._counts[place] == 1

    def if_none(self, act: Callable[[], None]) -> None:
        """Does something while no pool is current, and none can become it."""
        with self._lock:
            if not self._counts:
                act()


_underway = _Underway()
_mended = threading.Lock()
_is_mended = False


def mend(torch: Any) -> None:
    """Makes the innermost pool, or capture, the one that serves. Once; for the program's own pools as well."""
    global _is_mended
    with _mended:
        if not _is_mended and is_before_2_15(torch):
            memory = torch.cuda.memory
            originals = (
                memory._cuda_beginAllocateCurrentThreadToPool,
                memory._cuda_endAllocateToPool,
                memory._cuda_releasePool,
            )
            if is_before_2_11(torch):
                _mend_pools(memory, originals)
            _count_pools(memory)
            _mend_captures(torch, originals)
            _is_mended = True


def _place(device: Any, pool: Any) -> _Place:
    first, second = pool
    return int(device), (int(first), int(second))


# PyTorch's begin, end and release.
_Originals = tuple[Callable[..., None], Callable[..., None], Callable[..., None]]


def _mend_pools(memory: Any, originals: _Originals) -> None:
    """What `use_mem_pool` calls: begin, and in the end end and release."""
    begin, end, release = originals

    @functools.wraps(begin)
    def begin_inside(device: int, pool: tuple[int, int]) -> None:
        outer = _current.last_of(device)
        if outer is not None:
            end(*outer)
            release(*outer)
        try:
            begin(device, pool)
        except BaseException:
            if outer is not None:
                begin(*outer)
            raise
        _current.places.append((device, pool))

    @functools.wraps(release)
    def release_and_go_on(device: int, pool: tuple[int, int]) -> None:
        release(device, pool)
        if (device, pool) in _current.places:
            last = len(_current.places) - 1 - _current.places[::-1].index((device, pool))
            del _current.places[last]
            outer = _current.last_of(device)
            if outer is not None:
                begin(*outer)

    memory._cuda_beginAllocateCurrentThreadToPool = begin_inside
    memory._cuda_releasePool = release_and_go_on


def _count_pools(memory: Any) -> None:
    begin, release = memory._cuda_beginAllocateCurrentThreadToPool, memory._cuda_releasePool

    @functools.wraps(begin)
    def begin_counted(device: int, pool: tuple[int, int]) -> None:
        place = _place(device, pool)
        _underway.begins(place)
        try:
            begin(device, pool)
        except BaseException:
            _underway.ended(place)
            raise

    @functools.wraps(release)
    def release_counted(device: int, pool: tuple[int, int]) -> None:
        try:
            release(device, pool)
        finally:
            _underway.ended(_place(device, pool))

    memory._cuda_beginAllocateCurrentThreadToPool = begin_counted
    memory._cuda_releasePool = release_counted


def _mend_captures(torch: Any, originals: _Originals) -> None:
    """A capture has its own pool, whatever was current around it; and it gives that up also if it fails."""
    begin, end, release = originals
    graph_class = torch.cuda.CUDAGraph
    capture_begin, capture_end = graph_class.capture_begin, graph_class.capture_end

    def again(graph: Any) -> None:
        for place in graph.__dict__.pop("_sire_places", ()):
            begin(*place)

    def put_down(place: _Place | None) -> None:
        """A capture that failed is over; PyTorch forgets to say so to its allocator."""
        if place is not None:
            with suppress(RuntimeError):
                end(*place)
                release(*place)

    def over(graph: Any, place: _Place | None) -> None:
        if place is not None:
            _underway.ended(place)
        again(graph)

    @functools.wraps(capture_begin)
    def begin_alone(self: Any, pool: Any = None, capture_error_mode: str = "global", **more: Any) -> None:
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        mine = _place(torch.cuda.current_device(), pool)
        places = _current.last_of_each()
        for place in places:
            end(*place)
            release(*place)
        _underway.begins(mine)
        try:
            capture_begin(self, pool=pool, capture_error_mode=capture_error_mode, **more)
        except BaseException:
            if _underway.is_once(mine):
                put_down(mine)
            _underway.ended(mine)
            for place in places:
                begin(*place)
            raise
        self._sire_pool, self._sire_places = mine, places

    @functools.wraps(capture_end)
    def end_alone(self: Any) -> None:
        mine = self.__dict__.pop("_sire_pool", None)
        try:
            capture_end(self)
        except BaseException:
            put_down(mine)
            raise
        finally:
            over(self, mine)

    graph_class.capture_begin = begin_alone
    graph_class.capture_end = end_alone


# --- pools of graphs -------------------------------------------------------------------------------------

# Pools of graphs that may live, each with what the graph holds for it.
_kept: list[tuple[weakref.ref[Any], Any]] = []
_kept_lock = threading.Lock()


def keep(torch: Any, holder: object, mem_pool: Any) -> None:
    """The pool stays until `drop_unused` finds that the graph is gone; also at the end of the interpreter."""
    if is_before_2_15(torch):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mem_pool))
        with _kept_lock:
            _kept.append((weakref.ref(holder), mem_pool))


def drop_unused(retired: list[Any]) -> None:
    """Drops pools that are not used any more, and those whose graphs are gone, which let go of their pool after their
    Python attributes have gone.

    Not while a pool is current in any thread, or a capture: to drop one then would end the process too.
    """
    if retired or _kept:
        _underway.if_none(retired.clear)
        _underway.if_none(_drop_those_of_graphs)


def _drop_those_of_graphs() -> None:
    with _kept_lock:
        unused = [each for each in _kept if each[0]() is None and each[1].use_count() == 1]
        _kept[:] = [each for each in _kept if each not in unused]
    for _, mem_pool in unused:
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(mem_pool))
