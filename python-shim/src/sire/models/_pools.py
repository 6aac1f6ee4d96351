"""Resource pools: a device, how much of it managed objects may use, and who uses it.

A pool makes room when it is asked to. On a CUDA device the library goes first: what was released lazily makes way in
the order of `sire`'s policy, without Python. Then idle users of the pool are asked, those of low priority and those
used least recently first; they may be of any kind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _blocks, _library, _torch
from .._errors import BackupIoError, InvalidArgumentError, OutOfMemoryError, SireError
from .._sizes import Size, format_size, parse_size
from .._units.readings import read_cpu
from ._events import log

if TYPE_CHECKING:
    from ._users import ResourcePoolUserABC

Share = Size | str

_budgets: dict[int, tuple[tuple[int, float], tuple[int, float]]] = {}
"""By device: the headroom and the residency that the library was told, and those that others had asked for."""


def _bytes(amount: Share | None, total: int) -> int | None:
    """An amount such as ``"6GiB"`` or ``"5%"`` of ``total``."""
    if isinstance(amount, str) and amount.strip().endswith("%"):
        try:
            share = float(amount.strip().removesuffix("%"))
        except ValueError:
            raise InvalidArgumentError(f"{amount!r} is neither a size nor a percentage") from None
        if not 0 <= share <= 100:
            raise InvalidArgumentError(f"a percentage is between 0 and 100, not {amount!r}")
        return int(total * share / 100)
    return None if amount is None else parse_size(amount)


class ResourcePool:
    """A pool of a device. Subclasses say how much is free; the rest is here.

    ``limit`` is the most bytes that the pool's users may hold (None: what there is), ``headroom`` what stays free for
    others. Both are sizes, or a percentage of the whole.
    """

    device_type: ClassVar[str] = "cpu"

    def __init__(self, runtime_device: Any = None, *, limit: Share | None = None, headroom: Share = 0) -> None:
        import torch

        self._device = torch.device(runtime_device if runtime_device is not None else self.device_type)
        self._users: weakref.WeakSet[ResourcePoolUserABC[Any]] = weakref.WeakSet()
        self.set_limits(limit, headroom)

    def set_limits(self, limit: Share | None, headroom: Share = 0) -> None:
        """Changes the limits."""
        total = self.get_pool_total_size()
        self.limit = _bytes(limit, total)
        self.headroom = _bytes(headroom, total) or 0

    def get_pool_device(self) -> Any:
        """The pool's device."""
        return self._device

    def get_pool_total_size(self) -> int:
        """Bytes of the device."""
        raise NotImplementedError

    def get_device_free_size(self) -> int:
        """Bytes of the device that nobody has, other processes included."""
        raise NotImplementedError

    def get_pool_free_size(self) -> int:
        """Bytes that users of the pool can have without anybody making way."""
        free = self.get_device_free_size() - self.headroom
        if self.limit is not None:
            free = min(free, self.limit - self.get_pool_used_size())
        return max(0, free)

    def get_pool_used_size(self) -> int:
        """Bytes that users of the pool say they hold."""
        return sum(user.get_used_resource_size(self._device) for user in self.users)

    @property
    def users(self) -> list[ResourcePoolUserABC[Any]]:
        """The users, those to make way first in front."""
        return sorted(self._users, key=lambda user: (user.priority, user.last_used))

    def register_resource_pool_user(self, user: ResourcePoolUserABC[Any]) -> None:
        """The user may hold memory of the pool."""
        self._users.add(user)

    def remove_resource_pool_user(self, user: ResourcePoolUserABC[Any]) -> None:
        """The user holds none any more."""
        self._users.discard(user)

    def have_resource_pool_user(self, user: ResourcePoolUserABC[Any]) -> bool:
        """Whether the user is registered."""
        return user in self._users

    def request_resource(self, size: int) -> int:
        """Makes room for ``size`` bytes; returns how many are free then.

        `OutOfMemoryError` if idle users do not hold enough: what they could give, they may have given.
        """
        size = int(size)
        if self.get_pool_free_size() < size:
            self._give_back_caches()
        if self.get_pool_free_size() < size:
            self._make_room(size)
        for user in self.users:
            missing = size - self.get_pool_free_size()
            if missing <= 0:
                break
            self._ask(user, missing)
        free = self.get_pool_free_size()
        if free < size:
            raise self._refusal(size, free)
        return free

    def _ask(self, user: ResourcePoolUserABC[Any], missing: int) -> None:
        given = user.give_back_if_idle(self._device, missing)
        if given > 0:
            log.add("evict", user.name, given)

    def _give_back_caches(self) -> None:
        """What is only cached goes."""

    def _make_room(self, size: int) -> None:
        """What can make way without being asked goes."""

    def _refusal(self, size: int, free: int) -> SireError:
        holders = [(user.name, user.get_used_resource_size(self._device), user.locked) for user in self.users]
        listed = ", ".join(
            f"{name} {format_size(held)}{' (in use)' if locked else ''}" for name, held, locked in holders if held
        )
        from .._errors import error_class

        return error_class(OutOfMemoryError.status)(
            f"{format_size(size)} are needed on {self._device}, where {format_size(free)} of "
            f"{format_size(self.get_pool_total_size())} can be had within the pool's limits. Held by: "
            f"{listed or 'nobody'}. End a lease, raise the limit, or use smaller objects."
        )

    def summary(self) -> dict[str, Any]:
        """Bytes: total, free, used, limit and headroom, and how many users there are."""
        return {
            "total_bytes": self.get_pool_total_size(),
            "free_bytes": self.get_pool_free_size(),
            "used_bytes": self.get_pool_used_size(),
            "limit_bytes": self.limit,
            "headroom_bytes": self.headroom,
            "users": len(self._users),
        }

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._device}: {format_size(self.get_pool_free_size())} free>"


class ResourcePoolCPU(ResourcePool):
    """Host memory: the machine's or the control group's, whichever has less left."""

    def get_pool_total_size(self) -> int:
        """Bytes of the machine, or of the control group."""
        return read_cpu().total

    def get_device_free_size(self) -> int:
        """Bytes that can be had without swapping."""
        return read_cpu().free


class ResourcePoolCUDA(ResourcePool):
    """The memory of a CUDA device: what the driver has free, and what PyTorch holds without using it."""

    device_type = "cuda"

    def __init__(
        self, runtime_device: Any = 0, *, limit: Share | None = None, headroom: Share = 0, residency: float = 0.0
    ) -> None:
        import torch

        index = runtime_device if isinstance(runtime_device, int) else torch.device(runtime_device).index or 0
        self.residency = float(residency)
        super().__init__(torch.device("cuda", index), limit=limit, headroom=headroom)

    def set_limits(self, limit: Share | None, headroom: Share = 0) -> None:
        """Changes the limits. The library is told what stays free. Its own limit would count others' regions too: it is
        for `sire budget` to set, which may want more to stay free, too.
        """
        super().set_limits(limit, headroom)
        library, index = _library.load(), int(self._device.index)
        limit_of_others, *now = library.budget(index)
        told, of_others = _budgets.get(index, ((0, 0.0), (0, 0.0)))
        stays_free = of_others[0] if now[0] == told[0] else int(now[0])
        stays_for = of_others[1] if now[1] == told[1] else now[1]
        library.budget_set(index, limit_of_others, max(self.headroom, stays_free), max(self.residency, stays_for))
        # As the library has it, which rounds.
        _budgets[index] = library.budget(index)[1:], (stays_free, stays_for)

    def get_pool_total_size(self) -> int:
        """Bytes of the device."""
        import torch

        return int(torch.cuda.mem_get_info(self._device)[1])

    def get_device_free_size(self) -> int:
        """Bytes that the driver has free, and those in PyTorch's cache."""
        import torch

        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free) + _torch.free_in_cache(torch, self._device.index)

    def get_pool_free_size(self) -> int:
        """Bytes that users can have without anybody making way, within what `sire budget` has said, too."""
        limit, headroom, _ = _library.load().budget(self._device.index)
        free = self.get_device_free_size() - max(headroom, self.headroom)
        limits = [each for each in (limit or None, self.limit) if each is not None]
        if limits:
            free = min(free, min(limits) - self.get_pool_used_size())
        return max(0, free)

    def get_pool_used_size(self) -> int:
        """Bytes that users hold: the library is asked once for what their tags have."""
        users = self.users
        regions = _library.load().stats()["regions"]
        mine = {number for user in users for number in user.regions if user.get_runtime_device() == self._device}
        held = sum(int(regions[number]["resident_bytes"]) for number in mine)
        return held + sum(user.get_used_resource_size(self._device) for user in users if not user.regions)

    def _give_back_caches(self) -> None:
        _blocks.empty_cache()

    def _make_room(self, size: int) -> None:
        import torch

        missing = size - self.get_pool_free_size()
        free, _ = torch.cuda.mem_get_info(self._device)
        library = _library.load()
        limit, headroom, _ = library.budget(self._device.index)
        room = int(free) - headroom
        if limit:
            # There all regions count, also those that no pool knows: where they have too much, users are asked instead.
            devices = [each for each in library.stats()["devices"] if each["device"] == self._device.index]
            left = limit - sum(each["resident_bytes"] for each in devices)
            if left + missing < 0:
                return
            room = min(room, left)
        with suppress(OutOfMemoryError):
            # In the library's words: so many bytes more than there is.
            given, tags = library.make_room(self._device.index, max(0, room + missing))
            for tag in tags:
                log.add("evict", tag, given // len(tags), detail="what was held lazily")


class ResourcePoolDisk(ResourcePool):
    """A directory, and how much of its file system may be used."""

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, limit: Share | None = None) -> None:
        named = directory or os.environ.get("SIRE_DISK_DIR")
        if named:
            # As the library does when it needs it.
            try:
                os.makedirs(named, mode=0o700, exist_ok=True)
            except OSError as error:
                raise BackupIoError(f"the directory of disk backups cannot be used: {error}") from error
        self.directory = os.fspath(named or tempfile.gettempdir())
        super().__init__("meta", limit=limit)

    def get_pool_total_size(self) -> int:
        """Bytes of the file system."""
        return shutil.disk_usage(self.directory).total

    def get_device_free_size(self) -> int:
        """Bytes that the file system has free."""
        return shutil.disk_usage(self.directory).free


class ResourcePoolManagement:
    """All pools of the process by device, and the users in them."""

    def __init__(self) -> None:
        self._pools: dict[Any, ResourcePool] = {}
        self._users: weakref.WeakSet[ResourcePoolUserABC[Any]] = weakref.WeakSet()

    @staticmethod
    def _key(device: Any) -> Any:
        import torch

        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device

    def get_resource_pool(self, device: Any) -> ResourcePool | None:
        """The pool of a device; None if there is none."""
        return self._pools.get("disk" if device == "disk" else self._key(device))

    def set_resource_pool(self, device: Any, pool: ResourcePool) -> None:
        """Makes a pool that of a device; ``"disk"`` counts as one."""
        self._pools["disk" if device == "disk" else self._key(device)] = pool

    def get_devices(self) -> list[Any]:
        """Devices that have a pool."""
        return list(self._pools)

    @property
    def pools(self) -> dict[Any, ResourcePool]:
        """The pools by device."""
        return dict(self._pools)

    @property
    def users(self) -> list[ResourcePoolUserABC[Any]]:
        """All users."""
        return list(self._users)

    def get_user_pools(self, user: ResourcePoolUserABC[Any]) -> list[ResourcePool]:
        """The pools that a user is registered in."""
        return [pool for pool in self._pools.values() if pool.have_resource_pool_user(user)]

    def setup_user(self, user: ResourcePoolUserABC[Any]) -> None:
        """A new user says which pools it wants to be in."""
        for pool in user.on_setup(self):
            pool.register_resource_pool_user(user)
        self._users.add(user)

    def forget_user(self, user: ResourcePoolUserABC[Any]) -> None:
        """The user is in no pool any more."""
        for pool in self.get_user_pools(user):
            pool.remove_resource_pool_user(user)
        self._users.discard(user)
        from ._manage import forget

        forget(user)

    def clean_user(self) -> int:
        """Forgets users whose object nobody uses any more; how many."""
        gone = [user for user in self.users if user.should_clear()]
        for user in gone:
            self.forget_user(user)
        return len(gone)

    def __iter__(self) -> Iterator[ResourcePool]:
        return iter(self._pools.values())


_management: ResourcePoolManagement | None = None


def get_resource_management() -> ResourcePoolManagement:
    """The process's pools; made with the default ones at the first call."""
    from ._setup import setup_default_pools

    return setup_default_pools() if _management is None else _management


def set_resource_management(management: ResourcePoolManagement) -> None:
    """Replaces them."""
    global _management
    _management = management


def existing_management() -> ResourcePoolManagement | None:
    """The process's pools, if they were made."""
    return _management
