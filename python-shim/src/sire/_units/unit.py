"""One module's tensors, the tier they are in, and who is using them.

Tiers: ``gpu`` (any device that computes beside the CPU), ``cpu`` and ``disk``. A unit goes one tier at a time. Whoever
moves it has its lock; whoever uses it has a lease, and a leased unit does not leave. No unit knows another: who must
go for whom is `residency`'s to say.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

from .. import _owners
from .._errors import BusyError
from .disk import DiskStore, Stored
from .holding import Mover, Pieces, size_of, with_gradients

Tier = Literal["gpu", "cpu", "disk"]
MakeMover = Callable[[Sequence[Any], Any], Mover]
"""Of tensors, and the device that they are to be on or are on now."""


class Unit:
    """Tensors that move together. ``device``: where they are to be used; methods that move need ``lock`` held."""

    def __init__(
        self, name: str, tensors: Sequence[Any], device: Any, mover: MakeMover, disk: DiskStore | None
    ) -> None:
        self.name = name
        self.device = device
        self.lock = threading.RLock()
        self.priority = 0
        self.pinned = False
        self.frozen = False
        """An optimizer works on the tensors: they stay where they are."""
        self.holders: dict[int, int] = {}
        """Leases, by thread."""
        self.readers: weakref.WeakSet[Any] = weakref.WeakSet()
        """While one of them lives, the content does not go to the disk."""
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        """While one of them lives, the unit stays where it is."""
        self.last_used = time.monotonic()
        self.uses = 0
        self.ends: list[Any] | None = []
        """CUDA events of uses of the device's memory that have been given to it; None: not all uses are known."""
        self.in_use = True
        """Not offloaded: whoever offloads it says so, also where there is no device to leave."""
        self.tensors: list[Any] = []
        self._make = mover
        self._disk = disk
        self._mover: Mover | None = None
        self._away: tuple[Stored, Pieces] | None = None
        self._file: weakref.finalize[..., Any] | None = None
        self.set_tensors(tensors)

    # --- what it is ---------------------------------------------------------------------------------------

    @property
    def tier(self) -> Tier:
        """Where the content is."""
        if self._away is not None:
            return "disk"
        return "cpu" if self.here.type == "cpu" else "gpu"

    @property
    def on_disk(self) -> bool:
        """Whether the content is on the disk."""
        return self._away is not None

    @property
    def here(self) -> Any:
        """The device that the tensors are on; of several, one where they are not to be used: they are to come."""
        import torch

        if self._mover is not None and self._mover.arriving:
            return self._mover.device
        places = {each.device for each in self.tensors} or {torch.device("cpu")}
        return next(iter(places - {self.device} or places))

    @property
    def ready(self) -> bool:
        """Whether the tensors are where they are to be used."""
        return self._away is None and (not self.tensors or self.here == self.device) and not self.arriving

    @property
    def arriving(self) -> bool:
        """Whether the bytes are on their way to the device (`begin`), while the tensors show the host."""
        return self._mover is not None and self._mover.arriving

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, gradients not included."""
        return sum(size_of(each) for each in self.tensors)

    @property
    def device_bytes(self) -> int:
        """Bytes that it takes, or would take, on its device."""
        if self._mover is not None:
            return self._mover.device_bytes
        return sum(size_of(each) for each in with_gradients(self.tensors))

    @property
    def coming_bytes(self) -> int:
        """Bytes that it takes on its device beside what it has there."""
        return 0 if self.ready or self.arriving else self.device_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes that a backward pass will add."""
        return sum(size_of(each) for each in self.tensors if each.requires_grad and each.is_leaf and each.grad is None)

    @property
    def leases(self) -> int:
        """How many use it now."""
        return sum(self.holders.values())

    @property
    def may_leave(self) -> bool:
        """Whether nobody needs it where it is."""
        return not self.holders and not self.pinned and not self.frozen and not len(self.graphs)

    def used_by_others(self) -> bool:
        """Whether a thread other than the caller's has a lease."""
        return any(thread != threading.get_ident() for thread in list(self.holders))

    def set_tensors(self, tensors: Sequence[Any]) -> None:
        """From now on the unit is these tensors; those before are plain tensors in host memory or on the device."""
        if self._away is not None:
            self.promote()
        if self._mover is not None:
            self._mover.release()
        self._mover, self.tensors = None, list(tensors)

    # --- leases -------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """The calling thread uses the unit."""
        me = threading.get_ident()
        self.holders[me] = self.holders.get(me, 0) + 1
        self.frozen = False

    def let_go(self, thread: int) -> None:
        """Undoes one `hold` of a thread."""
        left = self.holders.get(thread, 0) - 1
        if left > 0:
            self.holders[thread] = left
        else:
            self.holders.pop(thread, None)

    def ended(self, event: Any) -> None:
        """A use of the device's memory is over when this event has happened."""
        if self.ends is not None:
            self.ends = [*(each for each in self.ends if not each.query()), event]

    def used_otherwise(self) -> None:
        """The device's memory may be in use in a way that no lease tells: who offloads it waits for the device."""
        with self.lock:
            self.ends = None

    def touch(self) -> None:
        """It is used now."""
        self.last_used = time.monotonic()
        self.uses += 1

    # --- moving -------------------------------------------------------------------------------------------

    def load(self) -> int:
        """To the device, from wherever it is. Returns the bytes that were copied."""
        self.promote()
        self.in_use = True
        if not self.arriving and (not self.tensors or self.here == self.device):
            return 0
        if self.device.type == "cpu":
            return self._offloaded()
        if not self.arriving:
            self.ends = []
        return self._its_mover().load(self.device)

    def begin(self) -> int:
        """As `load`, without waiting for the bytes where that can be: then a `load` completes it, whose caller's
        stream waits for them. Returns the bytes that are copied.
        """
        self.promote()
        if self.device.type == "cpu" or not self.tensors or self.here == self.device:
            return self.load()
        copied = self._its_mover().begin(self.device)
        if copied is None:
            return self.load()
        self.in_use, self.ends = True, []
        return copied

    def join(self) -> None:
        """The caller's stream sees the bytes, also if another stream was made to wait for them."""
        if self._mover is not None:
            self._mover.join()

    def _its_mover(self) -> Mover:
        if self._mover is None:
            self._mover = self._make(self.tensors, self.device)
        return self._mover

    def offload(self, after: Any = None) -> int:
        """To host memory, from the device; from the disk nothing happens. Returns the bytes that were copied.

        ``after`` is a CUDA event that lies behind everything that was done with the memory outside of leases: where all
        leases are known, the device is waited for up to there only.
        """
        self.refuse_use("offloaded")
        copied = self._offloaded(None if after is None or self.ends is None else [*self.ends, after])
        self.in_use = False
        return copied

    def demote(self) -> int:
        """To the disk. Returns the bytes that were written, which is nothing without a disk, while somebody reads, if
        it is there already, or if somebody else has adopted the tensors.
        """
        if self._disk is None or self._away is not None or not self.tensors or len(self.readers):
            return 0
        self.refuse_use("moved to the disk")
        self._offloaded()
        if self._mover is not None:
            self._mover.release()
            self._mover = None
        if any(each.device.type != "cpu" or _owners.of_tensor(each) is not None for each in self.tensors):
            return 0  # who has adopted them says where they are, and would take hollow ones for their content
        pieces = Pieces(self.tensors, with_gradients(self.tensors)[len(self.tensors) :])
        stored = self._disk.write(pieces.memory)
        pieces.hollow()
        self._away = (stored, pieces)
        # Nobody reads it again once the unit is gone.
        self._file = weakref.finalize(self, self._disk.drop, stored)
        self._file.atexit = False
        self.in_use = False
        return stored.stored_bytes

    def promote(self) -> int:
        """From the disk to host memory. Returns the bytes that were read; the file goes only when all is back."""
        if self._away is None or self._disk is None or self._file is None:
            return 0
        stored, pieces = self._away
        memory = pieces.fresh()
        self._disk.read(stored, memory)
        pieces.fill(memory)
        self._away = None
        self._file()
        return stored.stored_bytes

    def release(self) -> None:
        """The tensors are plain ones from now on, where they are; from the disk they come to host memory."""
        self.promote()
        if self._mover is not None:
            self._mover.release()
            self._mover = None

    def _offloaded(self, after: Sequence[Any] | None = None) -> int:
        if self._away is not None or self.tier == "cpu":
            return 0
        if self._mover is None:
            self._mover = self._make(self.tensors, self.here)
        copied = self._mover.offload(after)
        self.ends = []
        if self.tier == "gpu":  # somebody else has adopted the tensors, and may be gone the next time
            self._mover.release()
            self._mover = None
        return copied

    def refuse_use(self, what: str) -> None:
        """`BusyError` if somebody needs the unit where it is."""
        if not self.may_leave:
            why = "an optimizer works on it" if self.frozen else "pinned" if self.pinned else "in use"
            raise BusyError(f"{self.name!r} cannot be {what} now: it is {why}. Repeat the call afterwards")
