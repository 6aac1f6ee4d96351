"""Preemption by agreement: memory that gives way when another process of the same user needs it.

    with sire.reclaimable("cache", after_idle=600):      # the owner: in an inference server, say
        serve()

    with sire.wait_for_memory("6GiB", timeout=60):       # the needer: a training that does not fit beside it
        train()

The owner says what may go, and when; it goes at a safe point (`sire.safe_point`), with everything kept that its regions
keep, and comes back when the needer has ended, however that ended. docs/preemption.md says what holds.
"""

from __future__ import annotations

import math
import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _library, _tags, control
from ._errors import InvalidArgumentError
from ._sizes import Size, parse_size

if TYPE_CHECKING:
    from .torchtools.gpu_lock import ReserveGpu

_LARGEST_PRIORITY = 2**31 - 1


class Reclaimable:
    """The consent that `reclaimable` gives: until `close`, or the end of the ``with`` block."""

    def __init__(self, tag: str, mark: int, socket: control.Control) -> None:
        self.tag = tag
        self._mark, self._socket = mark, socket
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False

    def used(self, seconds_ago: float = 0.0) -> None:
        """The program has used the memory now, or so long ago: what its kernels do Sire does not see."""
        if isinstance(seconds_ago, bool) or not isinstance(seconds_ago, int | float) or not 0 <= seconds_ago < math.inf:
            raise InvalidArgumentError(f"seconds_ago is a number of seconds, 0 or more, not {seconds_ago!r}")
        _library.load().reclaimable_used(self._mark, float(seconds_ago))

    @property
    def figures(self) -> dict[str, Any]:
        """What others see of it: ``state``, ``gpus`` (bytes), ``idle_seconds``, ``obstacle``; empty when closed."""
        marks = [] if self._closed else _library.load().reclaimable()
        return next((each for each in marks if each["mark"] == self._mark), {})

    def close(self) -> None:
        """Nobody is given way to any more. What is away comes back now; if there is no room for it, that is raised, and
        it comes back at a later safe point.
        """
        with self._lock:
            if self._closed or self._pid != os.getpid():
                return
            self._closed = True
        try:
            _library.load().reclaimable_close(self._mark, control.told)
        finally:
            # Also without an error: in a callback, and in another process's turn on the device, nothing comes back now.
            control.owes()
            self._socket.close()

    def __enter__(self) -> Reclaimable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Reclaimable {self.tag!r}{', closed' if self._closed else ''}>"


def reclaimable(
    tag: str,
    priority: int = 0,
    after_idle: float | None = None,
    *,
    resume: bool = True,
    wait: bool | None = None,
    discard: bool = False,
    step_hook: bool = True,
) -> Reclaimable:
    """Lets other processes of the same user have the memory of a tag, and of what is under it, while they need it.

    Who needs it waits with `sire.wait_for_memory` or a reservation with ``preempt``, of this ``priority`` or a higher
    one. It goes at a safe point, backed up as its regions' policies say, and only after ``after_idle`` seconds without
    a use: memory is made in it, a thread enters or leaves it, it is resumed, `Reclaimable.used` says so.

    When the need is over it comes back by itself, at a safe point; with ``resume=False`` the program resumes it when it
    wants to. Until it is back the program waits at its safe points; with ``wait=False`` (and with ``resume=False``) it
    goes on, and uses none of it before it has resumed it. Regions without a backup do not give way unless
    ``discard``. Opens the control socket (`sire.control.open`, with ``step_hook``).
    """
    encoded = _tags.encode_tag(tag)
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > _LARGEST_PRIORITY:
        raise InvalidArgumentError(f"priority is a whole number of at most 32 bits, not {priority!r}")
    idle = 0.0 if after_idle is None else after_idle
    if isinstance(idle, bool) or not isinstance(idle, int | float) or not 0 <= idle < math.inf:
        raise InvalidArgumentError(f"after_idle is a number of seconds, 0 or more, not {after_idle!r}")
    if wait and not resume:
        raise InvalidArgumentError("a program that waits until the memory is back can not resume it; use wait=False")
    library = _library.load()
    # Before the socket: where that is forbidden, it says so.
    mark = library.reclaimable_open(encoded, priority, float(idle), resume, resume if wait is None else wait, discard)
    try:
        socket = control.open(step_hook=step_hook)
    except BaseException:
        library.reclaimable_close(mark)
        raise
    return Reclaimable(tag, mark, socket)


def wait_for_memory(
    size: Size, device: object = None, *, timeout: float | None = None, priority: int = 0
) -> ReserveGpu:
    """A context manager inside which ``size`` bytes of a GPU are left to this process, by all who use reservations.

    Waits its turn like `sire.torchtools.reserve_gpu_for_training`, which it is, without a fence and a margin. If memory
    is short, other processes are asked for what they have marked with `reclaimable` at most at this ``priority``; they
    get it back at the end of the block, or of this process. It gives the `Reservation`; `ReservationTimeoutError` says
    who did not give way, and why.
    """
    from .torchtools.gpu_lock import reserve_gpu_for_training

    wanted = parse_size(size)
    if wanted <= 0:
        raise InvalidArgumentError(f"size is {size!r}; nobody waits for 0 bytes")
    return reserve_gpu_for_training(device, wanted, 0, timeout=timeout, fence=False, preempt=priority)
