"""What programs ask of managed objects beside using them: prefetch, pin, a summary."""

from __future__ import annotations

import threading
from copy import copy
from typing import Any

from .._threads import starting
from ._events import log
from ._manage import AutoManageWrapper, acquire, manage, release
from ._pools import get_resource_management
from ._users import TorchModuleWrapper


class Prefetch:
    """An object that is being loaded in the background, and stays until `release`; at the end of a ``with`` block, too.

    Threads that use the object meanwhile wait for the load and then find it there.
    """

    def __init__(self, wrapper: AutoManageWrapper) -> None:
        self.wrapper = wrapper
        self._failure: BaseException | None = None
        self._done = threading.Event()
        self._released = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._load, name="sire-prefetch", daemon=True)
        with starting():
            self._thread.start()

    def _load(self) -> None:
        try:
            # Nobody waits for it: where there is no room now, it fails.
            acquire([self.wrapper.user], wait=0.0)
        except BaseException as error:
            self._failure = error
        finally:
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether it is over, one way or the other."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the load, and raises what it failed with; whether it is over."""
        over = self._done.wait(timeout)
        if self._failure is not None:
            # A copy: what is kept would keep the frames of all who wait.
            raise copy(self._failure) from self._failure
        return over

    def release(self) -> None:
        """The object need not stay any more. Once; repeating it is harmless."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self._done.wait()
        if self._failure is None:
            release([self.wrapper.user], holder=self._thread.ident)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def prefetch(obj: Any, **kwargs: Any) -> Prefetch:
    """Begins to load an object that will be used soon, if there is room for it now; returns at once.

    It stays until `Prefetch.release`. Keywords are those of `manage`. Where there is no room, `Prefetch.wait` raises;
    using the object later works as ever.
    """
    return Prefetch(manage(obj, **kwargs))


def pin(obj: Any) -> None:
    """Loads an object, and keeps it loaded until `unpin`."""
    user = manage(obj).user
    if user.pinned:
        return
    acquire([user])
    try:
        _set_pinned(user, True)
    finally:
        release([user])


def unpin(obj: Any) -> None:
    """Ends `pin`: the object is offloaded when nobody uses it."""
    user = manage(obj).user
    if user.pinned:
        acquire([user])
        _set_pinned(user, False)
        release([user])


def _set_pinned(user: Any, pinned: bool) -> None:
    if isinstance(user, TorchModuleWrapper):
        user.pin(pinned)
    else:
        user.pinned = pinned


def summary() -> dict[str, Any]:
    """Pools, managed objects and totals, as plain values.

    ``pools`` by device: bytes total, free, used, limit, headroom. ``objects``: name, device, whether it is loaded, how
    many use it, whether it is pinned, bytes that it has on its device. ``totals``: how many loads, hits, offloads,
    evictions, waits and failures there were, and bytes copied.
    """
    management = get_resource_management()
    return {
        "pools": {str(device): pool.summary() for device, pool in management.pools.items()},
        "objects": [
            {
                "name": user.name,
                "device": str(user.get_runtime_device()),
                "loaded": user.loaded,
                "uses": user.locks,
                "pinned": user.pinned,
                "priority": user.priority,
                "device_bytes": user.get_used_resource_size(user.get_runtime_device()),
            }
            for user in management.users
            if user.manage_object is not None
        ],
        "totals": log.totals(),
    }
