"""`manage` and `auto_manage`: who uses an object now, and who waits until there is room.

One thread at a time has the *turn* and loads; whoever ends a use tells those that wait. A thread waits for room only if
some other thread uses something and does not wait itself, so that waiting always has an end. A backward pass does not
wait for the thread that called it, which waits for the pass.

Modules that share tensors are used together: whoever uses one keeps those that have tensors of it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, ClassVar

from .. import control
from .._adopt import Release
from .._errors import InvalidArgumentError, OutOfMemoryError, SireError, UnsupportedError, error_class, raise_kept
from .._nested import to_device
from .._passes import caller
from . import _under_way
from ._backward import come_back_after_load, come_back_for_backward, watch_no_longer
from ._collected import catch_up
from ._context import sire_inference_context_manager
from ._estimate import measuring
from ._events import log
from ._outputs import outlasting
from ._pools import get_resource_management
from ._setup import default_release, setup_default_pools
from ._users import ResourcePoolUserABC, TorchModuleWrapper, note, user_adopted

_LONGEST_WAIT = 600.0

_turn = threading.Condition(threading.RLock())
_holders: Counter[int] = Counter()
_waiting: set[int] = set()


def acquire(users: list[ResourcePoolUserABC[Any]], wait: float = _LONGEST_WAIT) -> None:
    """This thread uses these objects from now on: all of them are loaded, or none is used, and the reason is raised."""
    _under_way.abandon_ended()
    catch_up()
    control.use_begins()
    try:
        _acquire(users, time.monotonic() + wait)
    except BaseException:
        control.use_ends()
        raise


def _acquire(users: list[ResourcePoolUserABC[Any]], deadline: float) -> None:
    me = threading.get_ident()
    with _turn:
        while True:
            try:
                _load_all(users)
                _holders[me] += len(users)
                for user in users:
                    user.held_by.append(me)
                return
            except OutOfMemoryError as error:
                called_by = caller()
                if not _may_wait({me, called_by}, deadline):
                    log.add("fail", users[0].name, detail=str(error))
                    if called_by is not None and _holders[called_by]:
                        raise _in_its_own_way(error, users) from error
                    raise
            _wait_for_others(me, deadline)


def _may_wait(mine: set[int | None], deadline: float) -> bool:
    others = [thread for thread, count in _holders.items() if count > 0 and thread not in mine]
    return any(thread not in _waiting for thread in others) and time.monotonic() < deadline


def _in_its_own_way(error: OutOfMemoryError, users: list[ResourcePoolUserABC[Any]]) -> SireError:
    names = ", ".join(user.name for user in users)
    return error_class(OutOfMemoryError.status)(
        f"{error} A backward pass needs {names} again, and the thread that called it uses others meanwhile: call it "
        "after these uses, or bring all of them in one (sire.auto_manage(a, b))."
    )


def _wait_for_others(me: int, deadline: float) -> None:
    _waiting.add(me)
    began = time.monotonic()
    try:
        # Bounded, because a thread may have ended without ending its uses.
        _turn.wait(min(1.0, max(0.0, deadline - began)))
    finally:
        _waiting.discard(me)
    log.add("wait", threading.current_thread().name, seconds=time.monotonic() - began)


def _load_all(users: list[ResourcePoolUserABC[Any]]) -> None:
    locked: list[ResourcePoolUserABC[Any]] = []
    try:
        for user in users:
            # Before room is made, so that none of them makes way for another.
            user.lock()
            locked.append(user)
            user.keep_sharers()
        for user in users:
            _load_with_sharers(user)
    except BaseException:
        for user in locked:
            if user.unlock() == 0:
                # What fails here stays loaded, and makes way when somebody needs room; the first failure is raised.
                for idle in [user, *user.let_sharers_go()]:
                    with suppress(SireError):
                        idle.offload_if_idle(default_release())
        raise


def _load_with_sharers(user: ResourcePoolUserABC[Any]) -> None:
    """What has tensors of its comes first; what is found to have some only when they are looked through, afterwards."""
    known = user.keep_sharers()
    for each in known:
        _load(each, called=False)
    _load(user)
    for each in user.keep_sharers():
        if each not in known:
            _load(each, called=False)


def _load(user: ResourcePoolUserABC[Any], called: bool = True) -> None:
    """``called``: for a call of the object's own."""
    began, adopted = time.monotonic(), user_adopted(user)
    before = adopted.bytes_copied if adopted is not None else 0
    needed = user.get_needed_resource_size()
    _make_room(user, needed, user.get_wanted_resource_size() if called else 0)
    _with_one_retry(user)
    copied = adopted.bytes_copied - before if adopted is not None else 0
    kind = "load" if needed else "hit"
    note(kind, user, size=needed, copied=copied, seconds=time.monotonic() - began)


def _make_room(user: ResourcePoolUserABC[Any], needed: int, wanted: int) -> None:
    """What loading takes must be there; what the call takes beside it should be."""
    pool = get_resource_management().get_resource_pool(user.get_runtime_device())
    if pool is None:
        return

    def make() -> None:
        if needed + wanted <= 0:
            return
        try:
            pool.request_resource(needed + wanted)
        except OutOfMemoryError:
            if needed and wanted:
                pool.request_resource(needed)
            elif needed:
                raise

    leased = getattr(user, "while_leased", None)
    if leased is None:
        make()
    else:
        leased(make)


def _with_one_retry(user: ResourcePoolUserABC[Any]) -> None:
    """Other processes, and tensors outside of pools, may have taken what was there: everybody idle makes way once."""
    try:
        user.load()
    except OutOfMemoryError:
        if evict(device=user.get_runtime_device()) == 0:
            raise
        user.load()


def release(
    users: list[ResourcePoolUserABC[Any]],
    how: Release | None = None,
    holder: int | None = None,
    collected: bool = False,
) -> None:
    """Ends one use of each; what nobody uses any more is offloaded, the last one first. The first failure is raised.

    ``holder``: the thread whose use it is (default: the calling one). ``collected``: as for `control.use_ends`.
    """
    failures: list[BaseException] = []
    ended: list[ResourcePoolUserABC[Any]] = []
    for user in reversed(users):
        try:
            left = user.unlock()
            ended.append(user)
            if left == 0:
                _offload_all([user, *user.let_sharers_go()], how or default_release())
        except BaseException as error:
            failures.append(error)
    if ended:
        # One call too many ends nothing, least of all the use of something else.
        control.use_ends(_let_go(ended, holder or threading.get_ident()), collected)
    raise_kept(failures)


def _let_go(users: list[ResourcePoolUserABC[Any]], thread: int) -> int:
    """The thread holds these no longer; of one that it never held, whoever took it last. Who held the first of them."""
    held: list[int] = []
    with _turn:
        for user in users:
            if not user.held_by:
                continue
            holder = thread if thread in user.held_by else user.held_by[-1]
            user.held_by.remove(holder)
            _holders[holder] -= 1
            if not _holders[holder]:
                del _holders[holder]
            held.append(holder)
        _turn.notify_all()
    return held[-1] if held else thread


def _offload_all(users: list[ResourcePoolUserABC[Any]], how: Release) -> None:
    """Those of them that nobody uses. The first failure is raised."""
    failures: list[BaseException] = []
    for user in users:
        try:
            _offload(user, how)
        except BaseException as error:
            failures.append(error)
    raise_kept(failures)


def _offload(user: ResourcePoolUserABC[Any], how: Release) -> None:
    began, adopted = time.monotonic(), user_adopted(user)
    before = adopted.bytes_copied if adopted is not None else 0
    if user.offload_if_idle(how):
        copied = adopted.bytes_copied - before if adopted is not None else 0
        note("offload", user, copied=copied, seconds=time.monotonic() - began, detail=how)


def evict(size: int | None = None, *, device: Any = None) -> int:
    """Objects that nobody uses give device memory back, those of low priority and those used least recently first.

    As many as it takes for ``size`` bytes, or all of them. Returns how many bytes that were.
    """
    _under_way.abandon_ended()
    catch_up()
    given, management = 0, get_resource_management()
    wanted = list(management) if device is None else [management.get_resource_pool(device)]
    for pool in wanted:
        if pool is None or pool.get_pool_device().type != "cuda":
            continue
        for user in pool.users:
            if size is not None and given >= size:
                break
            device_of_pool = pool.get_pool_device()
            part = user.give_back_if_idle(device_of_pool, user.get_used_resource_size(device_of_pool))
            given += part
            if part > 0:
                note("evict", user, size=part)
    return given


# --- wrappers ----------------------------------------------------------------------------------------------------

_users_of: weakref.WeakKeyDictionary[Any, ResourcePoolUserABC[Any]] = weakref.WeakKeyDictionary()
_making = threading.RLock()


def forget(user: ResourcePoolUserABC[Any]) -> None:
    """The user's object gets a new one when it is managed again."""
    with _making:
        for obj in [obj for obj, known in _users_of.items() if known is user]:
            del _users_of[obj]


def _known(obj: Any) -> ResourcePoolUserABC[Any] | None:
    """The user of the object; None also for one that cannot be looked up, which gets a new user each time."""
    try:
        return _users_of.get(obj)
    except TypeError:
        return None


class AutoManageWrapper:
    """An object that comes to its device when it is used. Made by `manage`; two of one object share everything."""

    type_wrapper_map: ClassVar[dict[type, Callable[..., ResourcePoolUserABC[Any]]]] = {}
    """Which user an object of a type gets; the most special type counts."""
    wrapper_obj_map = _users_of
    """The users of the objects that are managed now."""

    def __init__(self, obj: Any, **kwargs: Any) -> None:
        self._object = obj
        self.user = self._user_of(obj, kwargs)

    @classmethod
    def register_type_wrapper(cls, tp: type, wrapper_cls: Callable[..., ResourcePoolUserABC[Any]]) -> None:
        """Objects of this type, and of its subclasses, get such users: ``wrapper_cls(obj, **kwargs)``."""
        cls.type_wrapper_map[tp] = wrapper_cls

    registe_type_wrapper = register_type_wrapper
    """An old spelling."""

    @classmethod
    def _user_of(cls, obj: Any, kwargs: dict[str, Any]) -> ResourcePoolUserABC[Any]:
        setup_default_pools()
        _register_defaults()
        with _making:
            user = _known(obj)
            if user is not None:
                configure = getattr(user, "configure", None)
                if kwargs and configure is not None:
                    configure(**kwargs)
                return user
            made = cls._maker_for(obj)(obj, **kwargs)
            get_resource_management().setup_user(made)
            with suppress(TypeError):
                _users_of[obj] = made
            return made

    @classmethod
    def _maker_for(cls, obj: Any) -> Callable[..., ResourcePoolUserABC[Any]]:
        for kind in type(obj).__mro__:
            if kind in cls.type_wrapper_map:
                return cls.type_wrapper_map[kind]
        known = ", ".join(sorted(kind.__name__ for kind in cls.type_wrapper_map))
        raise UnsupportedError(
            f"a {type(obj).__name__} cannot be managed: known are {known}. Register a ResourcePoolUser for it with "
            "AutoManageWrapper.register_type_wrapper."
        )

    def load(self) -> None:
        """Begins a use: the object is on its device until as many `offload`."""
        acquire([self.user])
        come_back_after_load(self.user)

    def offload(self, release_: Release | None = None) -> None:
        """Ends a use. ``release_`` is "eager" or "lazy"; None: as the pools were set up."""
        watch_no_longer(self.user)
        release([self.user], release_)

    @property
    def is_loaded(self) -> bool:
        """Whether the object can be used on its device now."""
        return self.user.loaded

    def get_execution_device(self) -> Any:
        """The device on which the object runs while it is loaded."""
        return self.user.get_runtime_device()

    def get_manage_object(self) -> Any:
        """The object."""
        return self._object

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the object while it is loaded, with tensors among the arguments moved to its device."""
        device = self.get_execution_device()
        with sire_inference_context_manager(*args, **kwargs), auto_manage(self):
            estimator = getattr(self.user, "inference_memory_estimator", None)
            with measuring(estimator, device, args, kwargs):
                return outlasting(self._object(*to_device(args, device), **to_device(kwargs, device)), self.user)

    __call__ = call

    def __repr__(self) -> str:
        return f"<sire managed {self.user.name}: {'loaded' if self.is_loaded else 'offloaded'}, {self.user.locks} uses>"


def _register_defaults() -> None:
    import torch

    if torch.nn.Module not in AutoManageWrapper.type_wrapper_map:
        AutoManageWrapper.register_type_wrapper(torch.nn.Module, TorchModuleWrapper)
    from ._libraries import register

    register(AutoManageWrapper)


def manage(obj: Any, **kwargs: Any) -> AutoManageWrapper:
    """Makes an object one that comes to its device when it is used; it is offloaded afterwards.

    For a module: ``device``, ``priority`` (higher ones make way later), ``mutable`` and ``source`` as for
    `sire.models.adopt`, ``keep_alive`` (seconds), and ``inference_memory_estimator``: bytes, or a callable ``(model,
    *args, **kwargs) -> bytes``, or what `learned_estimator` and `Profiler` give.
    """
    return obj if isinstance(obj, AutoManageWrapper) else AutoManageWrapper(obj, **kwargs)


class auto_manage:  # noqa: N801
    """Objects are loaded inside, and offloaded at the end, also when the body raises.

        with sire.auto_manage(model) as wrapper: ...
        with sire.auto_manage(encoder, decoder) as (encoder_wrapper, decoder_wrapper): ...

    Uses are counted: inside, the same object may be managed again, in this thread and in others. Several objects are
    loaded all or none. Where there is no room, objects that nobody uses make way; what other threads use is waited for,
    at most ``wait`` seconds. Other keywords are those of `manage`.

    A backward pass that comes after the end finds the object again: it is loaded for it.
    """

    def __init__(self, *objs: Any, wait: float = _LONGEST_WAIT, **kwargs: Any) -> None:
        if not objs:
            raise InvalidArgumentError("auto_manage takes an object, or several")
        self._wrappers = tuple(manage(each, **kwargs) for each in objs)
        self._wait = wait
        # Those that were entered, by whom, and what goes with them. Reentrant: a generator may be collected meanwhile.
        self._entries: list[tuple[int, list[Any]]] = []
        self._entering = threading.RLock()

    def __enter__(self) -> Any:
        users = [wrapper.user for wrapper in self._wrappers]
        acquire(users, self._wait)
        try:
            entry = threading.get_ident(), come_back_for_backward(users)
        except BaseException:
            release(users)
            raise
        with self._entering:
            self._entries.append(entry)
        return self._wrappers[0] if len(self._wrappers) == 1 else self._wrappers

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        holder, handles = self._last_entry()
        for handle in handles:
            handle.remove()
        release([wrapper.user for wrapper in self._wrappers], holder=holder)

    def _last_entry(self) -> tuple[int, list[Any]]:
        """The calling thread's last one; of a thread that has none, whoever entered last: a generator's `with` may end
        in another thread.
        """
        me = threading.get_ident()
        with self._entering:
            if not self._entries:
                raise InvalidArgumentError("auto_manage was left more often than it was entered")
            mine = [at for at, (thread, _) in enumerate(self._entries) if thread == me]
            return self._entries.pop(mine[-1] if mine else -1)
