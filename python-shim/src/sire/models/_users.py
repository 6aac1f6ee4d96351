"""Users of resource pools: what is managed, and how it comes and goes.

A user is locked while somebody uses its object, as often as that is said: it loads at the first lock, and may be
offloaded at the last unlock. Loads take the process's *turn* first, then the user's own lock; nobody takes a turn while
holding the lock of a user, so that two users that want each other's memory do not wait for each other.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .. import _library
from .._adopt import Adopted, Release, adopt, adopted_by
from .._errors import InvalidArgumentError
from .._placing import device_index
from .._tags import encode_tag
from ._estimate import Estimator, estimated
from ._events import log
from ._saving import make_readable

if TYPE_CHECKING:
    from ._pools import ResourcePool, ResourcePoolManagement

T = TypeVar("T")


class ResourcePoolUserABC(ABC, Generic[T]):
    """Something that uses memory of pools. To make one of your own, say how it loads and how it gives memory back."""

    priority: int = 0
    """Users of a higher one make way later."""
    pinned: bool = False
    """It does not make way at all."""
    release: Release | None = None
    """How it is offloaded; None: as the pools were set up."""

    def __init__(self) -> None:
        self._locks = 0
        self.held_by: list[int] = []
        """The threads whose uses are under way, one for each use."""
        self._own = threading.RLock()
        self.loaded = False
        self.last_used = 0.0
        self._kept: list[ResourcePoolUserABC[Any]] = []

    # --- what a user has to say -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def manage_object(self) -> T | None:
        """What is managed; None once nobody else has it."""

    @abstractmethod
    def on_setup(self, manager: ResourcePoolManagement) -> list[ResourcePool]:
        """The pools that the user wants to be in."""

    @abstractmethod
    def on_load(self) -> None:
        """Makes the object usable on `get_runtime_device`. All of it, or nothing and an exception."""

    @abstractmethod
    def on_resource_request(self, device: Any, size: int) -> None:
        """Gives ``size`` bytes of a device back, or more, or what there is. Called only while nobody has it locked."""

    @abstractmethod
    def get_used_resource_size(self, device: Any) -> int:
        """Bytes of a device that the user holds."""

    @abstractmethod
    def get_runtime_device(self) -> Any:
        """The device on which the object runs."""

    # --- what follows from that -------------------------------------------------------------------------------

    def on_offload(self, _release: Release) -> None:
        """The last lock has ended: by default, memory of the runtime device is given back."""
        device = self.get_runtime_device()
        self.on_resource_request(device, self.get_used_resource_size(device))

    def get_used_resource_devices(self) -> list[Any]:
        """Devices that the user holds memory of."""
        device = self.get_runtime_device()
        return [device] if self.get_used_resource_size(device) else []

    def get_needed_resource_size(self) -> int:
        """Bytes of the runtime device that loading takes beyond what the user holds; what cannot be less."""
        return 0

    def get_wanted_resource_size(self) -> int:
        """Bytes that running would like beside that."""
        return 0

    @property
    def sharers(self) -> list[ResourcePoolUserABC[Any]]:
        """Users that have something of this one's object in their keeping: they are in use while this one is."""
        return []

    def should_clear(self) -> bool:
        """Whether the user can be forgotten."""
        return self.manage_object is None

    @property
    def name(self) -> str:
        """How the user is called in summaries and messages."""
        return type(self.manage_object).__name__

    @property
    def locked(self) -> bool:
        """Whether somebody uses the object, or it is pinned."""
        return self._locks > 0 or self.pinned

    @property
    def regions(self) -> tuple[int, ...]:
        """The library's numbers of the regions that hold all it has on its device; none if it holds it otherwise."""
        return ()

    @property
    def locks(self) -> int:
        """How many use it now."""
        return self._locks

    def lock(self) -> None:
        """Somebody uses the object: it stays where it is."""
        with self._own:
            self._locks += 1
            self.last_used = time.monotonic()

    def unlock(self) -> int:
        """Ends one `lock`; how many are left."""
        with self._own:
            if self._locks == 0:
                raise InvalidArgumentError(f"{self.name} is not in use: offload() was called more often than load()")
            self._locks -= 1
            self.last_used = time.monotonic()
            return self._locks

    def keep_sharers(self) -> list[ResourcePoolUserABC[Any]]:
        """`sharers` stay where they are as long as this one is in use, whoever else uses them; all of those that do.
        Called with the turn, in a use.
        """
        for each in self.sharers:
            with self._own:
                new = each not in self._kept
                if new:
                    self._kept.append(each)
            # Not with the lock of this one.
            if new:
                each.lock()
        return list(self._kept)

    def let_sharers_go(self) -> list[ResourcePoolUserABC[Any]]:
        """Unless somebody uses this one, they need not stay for it; those that nobody uses at all any more."""
        with self._own:
            kept, self._kept = ([], self._kept) if self.locked else (self._kept, [])
        return [each for each in reversed(kept) if each.unlock() == 0]

    def load(self) -> None:
        """Loads the object if it is not loaded; called with the turn."""
        with self._own:
            self.on_load()
            self.loaded = True

    def give_back_if_idle(self, device: Any, size: int) -> int:
        """Asks for ``size`` bytes of a device, unless somebody uses the object; how many were given.

        Nobody begins to use it meanwhile. Who uses it already is not waited for.
        """
        if self.locked:
            return 0
        with self._own:
            held = self.get_used_resource_size(device)
            if self.locked or held <= 0:
                return 0
            self.on_resource_request(device, size)
            return max(0, held - self.get_used_resource_size(device))

    def offload_if_idle(self, release: Release) -> bool:
        """Offloads the object unless somebody uses it; whether that was done."""
        with self._own:
            if self.locked or not self.loaded:
                return False
            self.on_offload(self.release or release)
            self.loaded = False
            return True


class BaseResourcePoolUser(ResourcePoolUserABC[T]):
    """A user that keeps its object."""

    def __init__(self, manage_object: T) -> None:
        super().__init__()
        self._object = manage_object

    @property
    def manage_object(self) -> T | None:
        """What is managed."""
        return self._object

    def should_clear(self) -> bool:
        """Never by itself: `ResourcePoolManagement.forget_user` ends it."""
        return False


class WeakRefResourcePoolUser(ResourcePoolUserABC[T]):
    """A user that does not keep its object, and goes with it."""

    def __init__(self, manage_object: T) -> None:
        super().__init__()
        self._reference = weakref.ref(manage_object)

    @property
    def manage_object(self) -> T | None:
        """What is managed; None once nobody else has it."""
        return self._reference()


_of_adopted: weakref.WeakKeyDictionary[Adopted, weakref.ref[TorchModuleWrapper]] = weakref.WeakKeyDictionary()
"""The users of modules, by how these are adopted."""


class TorchModuleWrapper(WeakRefResourcePoolUser[Any]):
    """A `torch.nn.Module`, adopted into a tag of its own.

    ``device`` is where it runs (None: the current CUDA device, or the CPU), ``inference_memory_estimator`` how much
    memory a call takes beside the weights, ``keep_alive`` for how many seconds after its last use it makes way only
    when nobody else is left. The rest is as for `sire.models.adopt`.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: Any = None,
        priority: int = 0,
        mutable: bool = False,
        backup: Any = "auto",
        mode: Any = "auto",
        tag: str | None = None,
        source: Any = None,
        keep_alive: float | None = None,
        inference_memory_estimator: Estimator | None = None,
    ) -> None:
        super().__init__(model)
        self.priority = int(priority)
        self.inference_memory_estimator = inference_memory_estimator
        self._keep_alive = float(keep_alive or 0.0)
        self._terms = {"mutable": mutable, "backup": backup, "mode": mode, "source": source}
        existing = adopted_by(model)
        self.adopted: Adopted = existing or adopt(
            model, device=device, backup=backup, mode=mode, priority=priority, mutable=mutable, tag=tag, source=source
        )
        _of_adopted[self.adopted] = weakref.ref(self)
        self._sharers = self.sharers
        self._readable: Any = None
        self._keep_readable()
        self._say_standing()

    @property
    def name(self) -> str:
        """Its tag."""
        return self.adopted.tag

    @property
    def sharers(self) -> list[ResourcePoolUserABC[Any]]:
        """Those whose modules were managed first, and have tensors that are this one's, too; and those that have some
        of theirs.
        """
        found: list[Adopted] = [self.adopted]
        for adopted in found:
            found += [each for each in adopted.shares if each not in found]
        users = [_of_adopted[each]() for each in found[1:] if each in _of_adopted]
        # Kept also when the program has dropped the other module: its user offloads what it has.
        self._sharers = [each for each in users if each is not None]
        return list(self._sharers)

    @property
    def regions(self) -> tuple[int, ...]:
        """Those of its tag."""
        return self.adopted.regions

    def configure(self, **changes: Any) -> None:
        """Changes what can be changed later: priority, keep_alive, inference_memory_estimator.

        None changes nothing, nor does what was said already.
        """
        fixed = changes.keys() - {"priority", "keep_alive", "inference_memory_estimator"}
        fixed = {name for name in fixed if not self._is_said(name, changes[name])}
        if fixed:
            raise InvalidArgumentError(
                f"{self.name} is managed already: {', '.join(sorted(fixed))} cannot be changed any more"
            )
        given = {name: value for name, value in changes.items() if value is not None}
        priority = int(given.get("priority", self.priority))
        self._keep_alive = float(given.get("keep_alive", self._keep_alive))
        self.priority = priority
        self.inference_memory_estimator = given.get("inference_memory_estimator", self.inference_memory_estimator)
        self._say_standing()

    def _is_said(self, name: str, value: Any) -> bool:
        """Whether a keyword that cannot be changed any more has this value anyway."""
        if name == "device":
            index = device_index(sys.modules["torch"], value)
            return value is None or str(self.adopted.device) == ("cpu" if index is None else f"cuda:{index}")
        if name == "tag":
            return value is None or value == self.name
        return name in self._terms and (value is None or value == self._terms[name])

    def _say_standing(self) -> None:
        if self.adopted.device.type == "cuda" and self.adopted.nbytes:
            tag = encode_tag(self.adopted.tag)
            _library.load().standing_set(tag, self.priority, self.pinned, self._keep_alive)

    def pin(self, pinned: bool) -> None:
        """Whether it may make way at all."""
        self.pinned = pinned
        self._say_standing()

    def on_setup(self, manager: ResourcePoolManagement) -> list[ResourcePool]:
        """The pools of the device that it runs on, and of the host."""
        devices = {self.adopted.device, "cpu"}
        return [pool for pool in map(manager.get_resource_pool, devices) if pool is not None]

    def on_load(self) -> None:
        """Parameters and buffers are on the device afterwards."""
        # What was hung in may open a region of the tag, which a lease must find.
        self.adopted.load(holding=self._leased)
        self._keep_readable()

    def _keep_readable(self) -> None:
        if self._readable is None and self.adopted.has_paused:
            self._readable = make_readable(self)

    def while_leased(self, action: Callable[[], Any]) -> Any:
        """Whoever makes way meanwhile, it is not this module."""
        with self._leased():
            return action()

    @contextmanager
    def _leased(self) -> Iterator[None]:
        if self.adopted.device.type != "cuda" or not self.adopted.nbytes:
            yield
            return
        library, tag = _library.load(), encode_tag(self.adopted.tag)
        library.lease(tag)
        try:
            yield
        finally:
            library.unlease(tag)

    def on_offload(self, release: Release) -> None:
        """Parameters and buffers are on the host afterwards, and with "eager" the device's memory is free."""
        self.adopted.offload(release)

    def on_resource_request(self, _device: Any, _size: int) -> None:
        """All of it goes."""
        with self._own:
            self.adopted.offload("eager")
            self.loaded = False

    def get_used_resource_size(self, device: Any) -> int:
        """Bytes that it takes on its device, or on the host while it is offloaded."""
        if device == self.adopted.device:
            return self.adopted.resident_bytes
        return self.adopted.nbytes if getattr(device, "type", device) == "cpu" else 0

    def get_needed_resource_size(self) -> int:
        """Bytes of the module that are not on the device."""
        needed = sum(each.nbytes - each.resident_bytes for each in (self.adopted, *self.adopted.shares))
        return needed if self.adopted.device.type == "cuda" else 0

    def get_wanted_resource_size(self) -> int:
        """What the estimator says about the call that it is loaded for."""
        if self.adopted.device.type != "cuda":
            return 0
        return estimated(self.inference_memory_estimator, self.manage_object)

    def get_runtime_device(self) -> Any:
        """Where it runs while it is loaded."""
        return self.adopted.device

    def close(self) -> None:
        """Ends it: the module is an ordinary one again, where it is now."""
        self.adopted.release()
        if self._readable is not None:
            self._readable.remove()


def user_adopted(user: ResourcePoolUserABC[Any]) -> Adopted | None:
    """How the user's module is adopted; None of a user without one."""
    return cast("Adopted | None", getattr(user, "adopted", None))


def note(kind: str, user: ResourcePoolUserABC[Any], **more: Any) -> None:
    """An event of a user's."""
    log.add(kind, user.name, **more)
