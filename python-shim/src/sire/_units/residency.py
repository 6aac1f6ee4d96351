"""Who is on the device: units come when they are used, and others go for them.

`Residency` is the mechanism: leases, room, eviction, what is brought before it is needed. Its questions are answered
by those who build on it: how many bytes are `missing` before a unit can come, whether an unasked-for unit
`may_come_early`, how much a device has to `spare`, and what happens when a lease ends (`left`). Who goes first is
`order.leaving_order`.

Locks: a unit's lock is held while that unit moves, and other units' locks are only ever tried, so that two threads
that want each other's memory never wait for each other. The residency's own lock is held for bookkeeping, never across
a copy.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

from .._errors import BusyError, OutOfBackupSpaceError, OutOfMemoryError, SireError, error_class
from .._passes import at_end
from .._threads import starting
from . import everyone, forks
from .order import Standing, UseOrder, leaving_order
from .unit import Unit

_MOST_EVENTS = 1000
_WORKER = "sire-units"

Result = TypeVar("Result")


class Event(NamedTuple):
    """Something that happened to a unit: ``load``, ``offload``, ``demote``, ``prefetch``, ``arrive``, ``failed``.

    A ``prefetch`` has been begun, the bytes are on their way; ``arrive`` is its first user, whose stream waits for
    them.
    """

    time: float
    """Seconds, `time.time`."""
    what: str
    unit: str
    bytes: int
    seconds: float
    note: str = ""


class Residency:
    """Units, and which of them are where. ``patience``: seconds to wait for memory that other threads use."""

    kind = "units"
    """What it is called where all are shown."""
    prefetch_depth = 0
    idle_threshold = float("inf")
    straight_to_disk = False
    by_last_use = False
    """What makes way in the background does so when its own last use is over, beside other work of the device. Uses on
    other streams than the caller's must be joined before a lease ends, as PyTorch's allocator wants it, too.
    """

    def __init__(self, patience: float = 30.0) -> None:
        self.units: weakref.WeakValueDictionary[str, Unit] = weakref.WeakValueDictionary()
        """Their modules keep them: a unit whose modules are gone is gone, and its memory with it."""
        self.counts = dict.fromkeys(("loads", "offloads", "demotions", "promotions", "prefetches", "hits", "misses"), 0)
        self.copied_bytes = 0
        self._patience = patience
        self._order: UseOrder[str] = UseOrder()
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._backward: dict[int, Unit] = {}
        self._passes: set[int] = set()
        """Backward passes whose end will be told."""
        self.begin_anew()
        forks.join(self)
        everyone.join(self)

    def begin_anew(self) -> None:
        """There is no background thread yet, and nothing is being loaded."""
        self._lock = threading.RLock()
        self._freed = threading.Condition(self._lock)
        self._worker: ThreadPoolExecutor | None = None
        self._coming: set[str] = set()
        self._promised: dict[str, tuple[Any, int]] = {}
        """Of units that are being loaded: device and bytes that no other may take."""

    # --- the questions --------------------------------------------------------------------------------------

    def missing(self, unit: Unit, beside: int = 0) -> int:
        """Bytes that others must give up before the unit can come; 0 if it can come now. ``beside``: bytes that are
        free but needed otherwise, by units on their way and gradients to come.
        """
        return 0

    def may_come_early(self, unit: Unit, beside: int = 0, given: int = 0) -> bool:
        """Whether a unit that nobody has asked for yet may be brought: only if nothing is `missing`. ``given``: bytes
        that others, who are needed later, have given up for it.
        """
        return self.missing(unit, beside) == 0

    def spare(self, device: Any) -> int:
        """Bytes that can be used on a device besides what its units take."""
        return 0

    def without_room(self, unit: Unit) -> None:
        """A unit that nobody has asked for yet could not come."""

    def left(self, unit: Unit) -> None:
        """A lease of the unit has ended."""

    # --- units ----------------------------------------------------------------------------------------------

    def add(self, unit: Unit) -> None:
        """The unit is looked after from now on."""
        with self._lock:
            self.units[unit.name] = unit

    def remove(self, unit: Unit) -> None:
        """The unit is not looked after any more; it stays where it is."""
        with self._lock:
            if self.units.get(unit.name) is unit:
                del self.units[unit.name]
            self._order.forget(unit.name)
            for task in [task for task, each in self._backward.items() if each is unit]:
                del self._backward[task]

    def listed(self) -> list[Unit]:
        """All units, in the order in which they came."""
        with self._lock:
            return list(self.units.values())

    def standing(self) -> list[dict[str, Any]]:
        """Of each unit its name, where it is, its bytes, how often it was used."""
        return [shown(unit) for unit in self.listed()]

    def events(self) -> list[Event]:
        """The last things that happened, oldest first."""
        with self._lock:
            return list(self._events)

    def upcoming(self, limit: int | None = None) -> list[str]:
        """Names of the units that are expected next, soonest first."""
        with self._lock:
            return self._order.upcoming(len(self.units) if limit is None else limit)

    def teach(self, names: Iterable[str]) -> None:
        """These units will be used in this order, again and again."""
        with self._lock:
            for name in [*(found := list(names)), *found]:
                self._order.used(name)

    # --- using a unit ---------------------------------------------------------------------------------------

    @contextmanager
    def lease(self, *units: Unit) -> Iterator[None]:
        """The units are where they are to be used, and stay there, until the end."""
        with ExitStack() as stack:
            for unit in units:
                self.acquire(unit)
                stack.callback(self.release, unit, threading.get_ident())
            try:
                yield
            except BaseException:
                # Other streams may have been given work that was to be joined.
                for unit in units:
                    unit.used_otherwise()
                raise

    def acquire(self, unit: Unit) -> None:
        """Brings the unit; it stays until `release`. `OutOfMemoryError` if there is no room, and then nothing is
        held.
        """
        with unit.lock:
            unit.hold()
            try:
                self._bring(unit)
                self._used(unit)
            except BaseException:
                unit.let_go(threading.get_ident())
                raise

    def release(self, unit: Unit, thread: int) -> None:
        """Ends a lease that ``thread`` took."""
        with unit.lock:
            unit.let_go(thread)
            event = self._mark(unit.device)
            if event is not None:
                unit.ended(event)
        with self._freed:
            self._freed.notify_all()
        if not unit.holders:
            self.left(unit)

    def hold_for_backward(self, unit: Unit) -> None:
        """The running backward pass needs the unit; it stays until the pass needs another one, or ends or
        raises.

        The one before may go for it: autograd is done with what was used later in the forward pass, and where it is
        not, it asks again.
        """
        import torch

        task = int(torch._C._current_graph_task_id())
        with self._lock:
            before = self._backward.get(task)
            goes_on = before is unit and unit.ready
            if not goes_on:
                self._backward.pop(task, None)
        if goes_on:
            unit.join()  # the pass may ask from another of its streams
            return
        with unit.lock:
            unit.hold()
            try:
                self._bring(unit, unit.gradient_bytes)
                unit.ends = None
                if task >= 0:
                    self._note_backward(task, unit)
            finally:
                unit.let_go(threading.get_ident())
        self._used(unit)
        if before is not None and before is not unit:
            self.left(before)

    def _note_backward(self, task: int, unit: Unit) -> None:
        with self._lock:
            is_known = task in self._passes
            self._passes.add(task)
        if not is_known:
            at_end(lambda _failed: self._backward_ended(task))
        with self._lock:
            self._backward[task] = unit

    def _backward_ended(self, task: int) -> None:
        with self._freed:
            self._passes.discard(task)
            unit = self._backward.pop(task, None)
            self._freed.notify_all()
        if unit is not None:
            self.left(unit)

    def needed_by_backward(self, unit: Unit) -> bool:
        """Whether a backward pass uses the unit, which has no lease then: kernels of it may be given its memory."""
        with self._lock:
            return any(each is unit for each in self._backward.values())

    def spared_by_backward(self, unit: Unit) -> None:
        """The running backward pass, whose own hook says so, does without the unit until it asks for it again."""
        import torch

        task = int(torch._C._current_graph_task_id())
        with self._lock:
            if self._backward.get(task) is unit:
                del self._backward[task]

    def _used(self, unit: Unit) -> None:
        unit.touch()
        with self._lock:
            self._order.used(unit.name)
        if self.prefetch_depth:
            self._expect(unit.device)

    def _mark(self, device: Any) -> Any:
        """An event behind all that the caller's stream was given until now; None where nobody asks for it."""
        if not self.by_last_use or device.type != "cuda":
            return None
        import torch

        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def _bring(self, unit: Unit, beside: int = 0) -> None:
        """To its device, with room for ``beside`` more bytes."""
        was_ready, coming = unit.ready, unit.arriving
        self.counts["hits" if was_ready or coming else "misses"] += 1
        try:
            if unit.device.type != "cpu" and (beside or not (was_ready or coming)):
                self.make_room(unit, beside)
            if was_ready:
                unit.in_use = True
                unit.join()
            else:
                self._load(unit, "arrive" if coming else "load")
        finally:
            self._break_promise(unit)

    def _load(self, unit: Unit, what: str) -> None:
        from_disk = unit.tier == "disk"
        started = time.perf_counter()
        try:
            copied = unit.load()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            copied = self._load_into_what_is_left(unit, error)
        self.counts["loads"] += what == "load"
        self.counts["promotions"] += from_disk
        self._note(what, unit, copied, started)

    def _load_into_what_is_left(self, unit: Unit, error: Exception) -> int:
        """After the device said that it is full: everybody who can go goes, as often as others let something go."""
        self._note("failed", unit, 0, time.perf_counter(), str(error).splitlines()[0])
        deadline = time.monotonic() + self._patience
        while True:
            for other in self._candidates(unit):
                self.evict(other)
            _empty_cache(unit.device)
            try:
                return unit.load()
            except Exception as again:
                if not is_out_of_memory(again):
                    raise
                if not self._wait_for_others(unit, deadline):
                    raise self._no_room(unit) from again

    # --- making room ------------------------------------------------------------------------------------------

    def make_room(self, unit: Unit, beside: int = 0) -> None:
        """Sends others away until nothing is missing for the unit and ``beside`` more bytes, or nobody is left who can
        go. The room found is the unit's.
        """
        deadline = time.monotonic() + self._patience
        while not self._promise(unit, beside):
            gone = self._evict_first(self._candidates(unit))
            if gone is None and not self._wait_for_others(unit, deadline):
                return

    def _promise(self, unit: Unit, beside: int = 0, given: int | None = None) -> bool:
        """Gives the unit its room if there is some beside what others were promised; whether there was. ``given``: it
        comes early, and others have given up so many bytes for it.
        """
        with self._lock:
            promised = beside + sum(size for device, size in self._promised.values() if device == unit.device)
            if given is None:
                has_room = self.missing(unit, promised) == 0
            else:
                has_room = self.may_come_early(unit, promised, given)
            if has_room:
                self._promised[unit.name] = (unit.device, unit.coming_bytes + beside)
            return has_room

    def _break_promise(self, unit: Unit) -> None:
        with self._lock:
            self._promised.pop(unit.name, None)

    def _wait_for_others(self, unit: Unit, deadline: float) -> bool:
        """Waits a moment for other threads to end a lease; False if there is nothing to wait for, or no time left."""
        if not self._others_in_use(unit) or time.monotonic() >= deadline:
            return False
        with self._freed:
            self._freed.wait(0.05)
        return True

    def evict(self, unit: Unit, after: Any = None) -> bool:
        """Offloads a unit if nobody uses or moves it now; whether it did. ``after`` as for `Unit.offload`."""

        def leave() -> bool:
            if unit.tier != "gpu":
                return False
            self.offload(unit, after)
            return unit.tier != "gpu"  # tensors that somebody else has adopted stay where they are

        return self._if_idle(unit, leave)

    def offload(self, unit: Unit, after: Any = None) -> None:
        """To host memory, or where that is not wanted to the disk. `BusyError` if it is in use, also by a backward
        pass.
        """
        with unit.lock:
            if self.needed_by_backward(unit):
                raise BusyError(
                    f"{unit.name!r} cannot be offloaded now: a backward pass uses it. Repeat the call when the pass is "
                    "over"
                )
            started, was_in_use = time.perf_counter(), unit.in_use
            self._note("offload", unit, unit.offload(after), started)
            self.counts["offloads"] += was_in_use
        if self.straight_to_disk:
            self.demote(unit)

    def demote(self, unit: Unit) -> bool:
        """To the disk if nobody uses it now; whether it did. Where the disk is full it stays, and the events say so."""

        def leave() -> bool:
            if unit.on_disk:
                return False
            started, was_in_use = time.perf_counter(), unit.in_use
            written = unit.demote()
            if not unit.on_disk:
                return False
            self.counts["demotions"] += 1
            self.counts["offloads"] += was_in_use
            self._note("demote", unit, written, started)
            return True

        return self._if_idle(unit, leave)

    def _if_idle(self, unit: Unit, leave: Callable[[], bool]) -> bool:
        """What `leave` says, called where nobody uses or moves the unit; False elsewhere, or where there is no room."""
        if not unit.lock.acquire(blocking=False):
            return False
        started = time.perf_counter()
        try:
            return unit.may_leave and not self.needed_by_backward(unit) and leave()
        except OutOfBackupSpaceError as error:
            self._note("failed", unit, 0, started, str(error))
            return False
        finally:
            unit.lock.release()

    def _evict_first(self, candidates: list[Unit], after: Any = None) -> Unit | None:
        """Who of them went; None if nobody could."""
        return next((each for each in candidates if self.evict(each, after)), None)

    def _candidates(self, coming: Unit) -> list[Unit]:
        """Who could go, first those who should."""
        return [each for each in self.in_leaving_order("gpu") if each is not coming and each.here == coming.device]

    def in_leaving_order(self, tier: str) -> list[Unit]:
        """Units of a tier that nobody uses, first those who should leave it."""
        now = time.monotonic()
        found = {each.name: each for each in self.listed() if each.tier == tier and each.may_leave and each.tensors}
        standing = {name: Standing(now - it.last_used, it.uses, it.priority) for name, it in found.items()}
        return [found[name] for name in self.choose(standing, self.upcoming())]

    def choose(self, candidates: dict[str, Standing], upcoming: list[str]) -> list[str]:
        """The rule by which units leave."""
        return leaving_order(candidates, upcoming, self.idle_threshold)

    def _others_in_use(self, coming: Unit) -> bool:
        with self._lock:
            others = [each for each in self.units.values() if each is not coming]
            coming_too = {each.name for each in others if each.name in self._promised and each.device == coming.device}
        there = (each for each in others if each.here == coming.device or each.name in coming_too)
        return any(each.used_by_others() for each in there)

    def _no_room(self, unit: Unit) -> SireError:
        users = [each.name for each in self.listed() if each is not unit and each.leases and each.here == unit.device]
        return error_class(OutOfMemoryError.status)(
            f"no room for {unit.name!r} on {unit.device}: it needs {unit.device_bytes} bytes, and everything that "
            f"could go has gone; in use: {', '.join(users) or 'nothing of these units'}. Use a smaller batch, "
            "smaller units, or free other memory, and repeat the call"
        )

    # --- before it is needed ----------------------------------------------------------------------------------

    def prefetch(self, unit: Unit, after: Any = None) -> Future[bool]:
        """Begins to bring a unit; the result says whether it came. Nothing that is needed sooner goes for it.
        ``after`` as for `Unit.offload`, of what goes. Where there is no thread to do it, the unit comes when it is
        used.
        """
        with self._lock:
            self._coming.add(unit.name)
        try:
            return self.in_background(lambda: self._come_early(unit, after))
        except SireError:
            with self._lock:
                self._coming.discard(unit.name)
            came: Future[bool] = Future()
            came.set_result(False)
            return came

    def in_background(self, work: Callable[[], Result], alone: bool = False) -> Future[Result]:
        """Does something in the background thread; ``alone``: in one of its own, because it waits for that thread.
        `SireError` if there is no thread to be had.
        """
        if alone:
            worker = ThreadPoolExecutor(1, thread_name_prefix="sire-units-wait")
            with starting():
                future = worker.submit(work)
            worker.shutdown(wait=False)
            return future
        with self._lock:
            worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix=_WORKER)
            with starting():
                future = worker.submit(work)
            self._worker = worker  # one without a thread would keep the work for the next one that it can start
            return future

    def settle(self) -> None:
        """Waits until everything that was begun in the background is done; not in the background itself."""
        with self._lock:
            worker = self._worker
        if worker is not None and not threading.current_thread().name.startswith(f"{_WORKER}_"):
            try:
                worker.submit(lambda: None).result()
            except RuntimeError:
                worker.shutdown(wait=True)  # the interpreter ends, and nothing can be begun any more

    def close(self) -> None:
        """Ends the background thread; what it has begun is completed."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(wait=True)

    def _expect(self, device: Any) -> None:
        expected = [self.units.get(name) for name in self.upcoming(self.prefetch_depth)]
        wanted = [
            unit
            for unit in expected
            if unit is not None and not (unit.ready or unit.arriving or unit.name in self._coming)
        ]
        after = self._mark(device) if wanted else None
        for unit in wanted:
            self.prefetch(unit, after)

    def _come_early(self, unit: Unit, after: Any) -> bool:
        try:
            if not unit.lock.acquire(blocking=False):
                return False
            try:
                if unit.ready or unit.arriving or unit.frozen:
                    return unit.ready or unit.arriving
                if not self._make_room_early(unit, after):
                    self.without_room(unit)
                    return False
                started = time.perf_counter()
                try:
                    copied = unit.begin()
                finally:
                    self._break_promise(unit)
                self.counts["loads"] += 1
                self.counts["prefetches"] += 1
                self._note("prefetch", unit, copied, started)
                return True
            finally:
                unit.lock.release()
        except Exception as error:
            # Whoever needs the unit brings it, and is told what is wrong.
            self._note("failed", unit, 0, time.perf_counter(), f"prefetch: {error}")
            return False
        finally:
            with self._lock:
                self._coming.discard(unit.name)

    def _make_room_early(self, unit: Unit, after: Any) -> bool:
        position = {name: at for at, name in enumerate(self.upcoming())}
        mine, given = position.get(unit.name, len(position)), 0
        while not self._promise(unit, given=given):
            later = [each for each in self._candidates(unit) if position.get(each.name, len(position) + 1) > mine]
            gone = self._evict_first(later, after)
            if gone is None:
                return False
            given += gone.device_bytes
        return True

    # --- keeping account ----------------------------------------------------------------------------------------

    def _note(self, what: str, unit: Unit, size: int, started: float, note: str = "") -> None:
        event = Event(time.time(), what, unit.name, size, time.perf_counter() - started, note)
        with self._lock:
            self._events.append(event)
            self.copied_bytes += size
        self.happened(event)

    def happened(self, event: Event) -> None:
        """Told of every event; no lock is held but the unit's."""


def shown(unit: Unit) -> dict[str, Any]:
    """What is shown of a unit, as plain values."""
    return {"name": unit.name, "tier": unit.tier, "bytes": unit.nbytes, "uses": unit.uses}


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device said that it is full."""
    import torch

    return isinstance(error, OutOfMemoryError | torch.OutOfMemoryError)


def _empty_cache(device: Any) -> None:
    import torch

    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
