"""Commits: changes to an object that can be taken back, and proxies that say which changes the object is to have.

Many proxies share one base object. Each says a *stack* of commits; using a proxy rebases the object: what is on it
beyond the longest common prefix is reverted, the rest is applied. All or nothing: if a commit fails, the object is
what it was.

    base = CommitObjectProxy(model)
    styled = base.clone_and_add_commit(LoraCommit("style.safetensors"))
    with styled as model: ...      # the weights of the style
    with base as model: ...        # the weights as they were, to the bit

Leaving a proxy changes nothing: the next one that is used pays for the difference, unless ``revert_on_exit`` is set.
"""

from __future__ import annotations

import sys
import threading
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from .._errors import InvalidArgumentError, SireError
from ._guard import Guard
from ._undo import Undo, at_hand, backups_serve

T = TypeVar("T")
Revert = Callable[[Any], object]


class CommitABC(ABC, Generic[T]):
    """A change to an object. One commit may be applied to many objects; what it takes to revert it is kept for each."""

    @property
    def commit_uuid(self) -> str:
        """What tells commits apart."""
        return _own_of(self).uuid

    @abstractmethod
    def apply(self, obj: T, **kwargs: Any) -> Revert | None:
        """Changes the object, and returns what takes the change back: a callable that is given the object.

        A subclass that overrides `revert` may return None. If it raises, the object must be as before.
        """

    def revert(self, obj: T) -> None:
        """Takes the change back that the last `apply` made to this object."""
        self.get_revert_callable(obj)(obj)
        self.release_revert_resource(obj)

    def get_revert_callable(self, obj: T) -> Revert:
        """What takes the change to this object back; `InvalidArgumentError` if it was not applied to it."""
        base = _own_of(self).bases.get(id(obj))
        found = None if base is None else base.reverts.get(self.commit_uuid)
        if found is None:
            raise InvalidArgumentError(f"{type(self).__name__} was not applied to this {type(obj).__name__}")
        return found

    def release_revert_resource(self, obj: T) -> None:
        """Forgets what it would take to revert; the change stays."""
        base = _own_of(self).bases.get(id(obj))
        if base is not None:
            base.reverts.pop(self.commit_uuid, None)


class _Own:
    """What a commit has, and no copy of it: its identity, and the bases of the objects that it is applied to. What
    reverts it is the base's, and goes with the object.
    """

    def __init__(self, commit: CommitABC[Any] | None = None) -> None:
        self.of = None if commit is None else weakref.ref(commit)
        self.uuid = uuid.uuid4().hex
        self.bases: weakref.WeakValueDictionary[int, _Base] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[type[_Own], tuple[()]]:
        return (_Own, ())


_own_lock = threading.Lock()


def _own_of(commit: CommitABC[Any]) -> _Own:
    with _own_lock:
        found: _Own | None = commit.__dict__.get("_own")
        if found is None or found.of is None or found.of() is not commit:
            found = commit.__dict__["_own"] = _Own(commit)
        return found


def _apply(commit: CommitABC[T], obj: T, base: _Base) -> Revert:
    """Applies a commit; what reverts it."""
    revert = commit.apply(obj)
    if revert is None:
        if type(commit).revert is CommitABC.revert:
            raise InvalidArgumentError(
                f"{type(commit).__name__}.apply returned nothing: return what reverts it, or override revert"
            )
        revert = commit.revert
    _own_of(commit).bases[id(obj)] = base
    base.reverts[commit.commit_uuid] = revert
    return revert


class CallableCommit(CommitABC[T]):
    """``function(obj)`` changes the object and returns what reverts it: a callable, with or without an argument.

    ``touches``: names of parameters and buffers that it writes to. They are saved before and restored afterwards, to
    the bit, so that the function need not return anything.

    If the function raises, the object's attributes, submodules and hooks are put back, and what it ``touches``. Other
    tensors that it had written to by then cannot be: the proxy says so, and refuses to go on until it is told
    `CommitObjectProxy.forget`.
    """

    def __init__(self, function: Callable[[T], Any], touches: Sequence[str] = ()) -> None:
        self._function = function
        self._touches = tuple(touches)

    def apply(self, obj: T, **kwargs: Any) -> Revert:
        """Calls the function."""
        undo, guard = Undo(), Guard(obj)
        named = named_tensors(obj) if self._touches else {}
        touched = [required(named, name, obj) for name in self._touches]
        for each in touched:
            undo.save(each)
        try:
            with at_hand(*touched):
                theirs = self._function(obj)
            if theirs is None and not self._touches:
                raise InvalidArgumentError(
                    "the function of a CallableCommit returns what reverts it, or touches= is given"
                )
        except BaseException as error:
            guard.restore(error, restored=touched)
            undo.restore_after(error)
            raise

        def revert(base: Any) -> None:
            if theirs is not None:
                _call_with_or_without(theirs, base)
            undo.restore()

        return revert


def _call_with_or_without(function: Callable[..., Any], argument: Any) -> None:
    import inspect

    try:
        inspect.signature(function).bind(argument)
    except TypeError:
        function()
    except ValueError:  # a builtin that does not tell
        function(argument)
    else:
        function(argument)


def named_tensors(obj: Any) -> dict[str, Any]:
    """An object's parameters and buffers by name, tied ones by all of their names."""
    import torch

    if not isinstance(obj, torch.nn.Module):
        raise InvalidArgumentError(f"weights are those of a torch.nn.Module, not of a {type(obj).__name__}")
    found = dict(obj.named_parameters(remove_duplicate=False))
    found.update(obj.named_buffers(remove_duplicate=False))
    return found


def required(named: dict[str, Any], name: str, obj: Any) -> Any:
    """The tensor of this name; `InvalidArgumentError` if there is none."""
    if name not in named:
        some = ", ".join(list(named)[:5]) + (", ..." if len(named) > 5 else "")
        raise InvalidArgumentError(f"{type(obj).__name__} has no parameter or buffer {name!r}; it has {some}")
    return named[name]


# --- the base object ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Applied:
    commit: CommitABC[Any]
    revert: Revert


class _Base:
    """What is applied to one object now, whoever wants it. The lock is held while somebody uses the object."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.applied: list[_Applied] = []
        self.reverts: dict[str, Revert] = {}
        self.users: list[CommitObjectProxy[Any]] = []
        self.unknown: str | None = None
        self.served: weakref.WeakSet[Undo] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[_Base], tuple[()]]:
        """Copies of the object are objects of their own, which have no commits."""
        return (_Base, ())

    def rebase(self, obj: Any, wanted: Sequence[CommitABC[Any]]) -> None:
        """Makes the object have these commits, or leaves it as it was."""
        if self.unknown is not None:
            raise SireError(
                f"the state of this {type(obj).__name__} is not known: {self.unknown}. Restore its weights, "
                "then call forget()"
            )
        keep = self._common(wanted)
        if keep == len(self.applied) == len(wanted):
            return
        before = [each.commit for each in self.applied[keep:]]
        try:
            self._revert_to(obj, keep)
            self._apply_all(obj, wanted[keep:])
        except BaseException as error:
            self._go_back(obj, keep, before, error)
            raise
        finally:
            _forget_casts()

    def _common(self, wanted: Sequence[CommitABC[Any]]) -> int:
        """Length of the longest common prefix."""
        count = 0
        for each, commit in zip(self.applied, wanted, strict=False):
            if each.commit.commit_uuid != commit.commit_uuid:
                break
            count += 1
        return count

    def _revert_to(self, obj: Any, count: int) -> None:
        while len(self.applied) > count:
            last = self.applied[-1]
            last.revert(obj)
            last.commit.release_revert_resource(obj)
            self.applied.pop()

    def _apply_all(self, obj: Any, commits: Sequence[CommitABC[Any]]) -> None:
        for commit in commits:
            self.applied.append(_Applied(commit, _apply(commit, obj, self)))

    def _go_back(self, obj: Any, keep: int, before: list[CommitABC[Any]], error: BaseException) -> None:
        if getattr(error, "sire_state_unknown", None):
            self.unknown = str(error.sire_state_unknown)  # type: ignore[attr-defined]
            return
        try:
            # What was not reverted yet is still in place.
            same = 0
            for each, commit in zip(self.applied[keep:], before, strict=False):
                if each.commit is not commit:
                    break
                same += 1
            self._revert_to(obj, keep + same)
            self._apply_all(obj, before[same:])
        except BaseException as second:
            self.unknown = getattr(second, "sire_state_unknown", None)
            if not isinstance(second, Exception):
                raise
            raise SireError(
                f"a commit failed ({error}), and so did the way back ({second}); {self._what_is_left(obj)}"
            ) from error

    def keep_copies(self) -> None:
        """The object may be offloaded with its commits: what host copies would have undone must be somewhere else."""
        with self.lock:
            if not self.applied or any(isinstance(each, AutoManageCommitObjectProxy) for each in self.users):
                return
            try:
                for undo in list(self.served):
                    undo.keep()
            except Exception as error:
                self.unknown = f"it was offloaded with commits that can no longer be undone ({error})"

    def _what_is_left(self, obj: Any) -> str:
        if self.unknown is not None:
            return f"the state of this {type(obj).__name__} is not known: {self.unknown}"
        names = [type(each.commit).__name__ for each in self.applied]
        return f"the object has the commits {names} now, and the call can be repeated"


def _forget_casts() -> None:
    """`torch.autocast` keeps what it has cast weights to until its block ends, whatever is written to them."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.clear_autocast_cache()


_KEY = "_sire_commits"
_bases: weakref.WeakKeyDictionary[Any, _Base] = weakref.WeakKeyDictionary()
_bases_lock = threading.Lock()


def _base_of(obj: Any) -> _Base:
    """The one base of an object: proxies that were made of it independently share it, and it lives as long as the
    object.

    It hangs in the object where that is possible. (What has neither attributes nor weak references has a base for each
    proxy.)
    """
    attributes = getattr(obj, "__dict__", None)
    with _bases_lock:
        if isinstance(attributes, dict):
            return cast(_Base, attributes.setdefault(_KEY, _Base()))
        try:
            return _bases.setdefault(obj, _Base())
        except TypeError:
            return _Base()


# --- proxies --------------------------------------------------------------------------------------------------


class CommitObjectProxy(Generic[T]):
    """An object with a stack of commits. Cheap; made of an object, or of another proxy, whose stack it begins with.

    As a context manager it gives the object with its commits applied; until it is left, other threads wait, and inside
    it other proxies of the object may be used, after which this one's commits are back. ``revert_on_exit``: leaving
    the outermost proxy reverts everything.
    """

    def __init__(self, base: T | CommitObjectProxy[T], *, revert_on_exit: bool | None = None) -> None:
        if isinstance(base, CommitObjectProxy):
            self._object: T = base._object
            self._base: _Base = base._base
            self._stack: list[CommitABC[Any]] = list(base._stack)
            self.revert_on_exit: bool = base.revert_on_exit if revert_on_exit is None else revert_on_exit
        else:
            self._object = base
            self._base = _base_of(base)
            self._stack = []
            self.revert_on_exit = bool(revert_on_exit)

    # --- the stack ------------------------------------------------------------------------------------------

    @property
    def base_object(self) -> T:
        """The object, with whatever is applied to it now."""
        return self._object

    @property
    def commit_stack(self) -> tuple[CommitABC[Any], ...]:
        """The commits that the object is to have, first to last."""
        return tuple(self._stack)

    @property
    def applied_commits(self) -> tuple[CommitABC[Any], ...]:
        """The commits that the object has now."""
        return tuple(each.commit for each in self._base.applied)

    @property
    def state_uuid(self) -> str | None:
        """The last commit that the object has now; None: none."""
        return self._base.applied[-1].commit.commit_uuid if self._base.applied else None

    def clone(self) -> CommitObjectProxy[T]:
        """Another proxy of the same object with the same stack."""
        return type(self)(self)

    def add_commit(self, commit: CommitABC[Any]) -> CommitObjectProxy[T]:
        """Puts a commit on top of the stack; the object changes when the proxy is used. Returns the proxy."""
        if not isinstance(commit, CommitABC):
            raise InvalidArgumentError(f"a commit is a CommitABC, not a {type(commit).__name__}")
        if any(each.commit_uuid == commit.commit_uuid for each in self._stack):
            raise InvalidArgumentError("this commit is on the stack already; make another one to apply it twice")
        self._stack.append(commit)
        return self

    def clone_and_add_commit(self, commit: CommitABC[Any]) -> CommitObjectProxy[T]:
        """A clone with a commit on top."""
        return self.clone().add_commit(commit)

    def clone_and_add_callable_commit(
        self, function: Callable[[T], Any], touches: Sequence[str] = ()
    ) -> CommitObjectProxy[T]:
        """A clone with a `CallableCommit` on top."""
        return self.clone_and_add_commit(CallableCommit(function, touches))

    # --- using it -------------------------------------------------------------------------------------------

    def apply_commit_stack(self) -> T:
        """Makes the object have this proxy's commits, all or nothing; returns it."""
        with self._base.lock:
            self._base.rebase(self._object, self._stack)
            return self._object

    def get_current_object(self) -> T:
        """As `apply_commit_stack`."""
        return self.apply_commit_stack()

    def revert_all(self) -> T:
        """Makes the object what it was without any commits; returns it."""
        with self._base.lock:
            self._base.rebase(self._object, ())
            return self._object

    def forget(self) -> None:
        """Says that the object is what it is without commits: nothing will be reverted any more."""
        with self._base.lock:
            self._base.applied.clear()
            self._base.reverts.clear()
            self._base.unknown = None

    def __enter__(self) -> T:
        self._base.lock.acquire()
        try:
            self._base.rebase(self._object, self._stack)
        except BaseException:
            self._base.lock.release()
            raise
        self._base.users.append(self)
        return self._object

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._base.users.pop()
            if self._base.users:
                self._base.rebase(self._object, self._base.users[-1]._stack)
            elif self.revert_on_exit:
                self._base.rebase(self._object, ())
        finally:
            self._base.lock.release()

    def __repr__(self) -> str:
        names = ", ".join(type(each).__name__ for each in self._stack)
        return f"<{type(self).__name__} of {type(self._object).__name__} [{names}]>"


_managing: ContextVar[Any] = ContextVar("sire_commit_am", default=None)


class CommitWithAutoManage(CommitABC[T]):
    """A commit that wants to know where its object runs: `am` is the object's `AutoManageWrapper` while it is
    applied.
    """

    @property
    def am(self) -> Any:
        """The wrapper; `InvalidArgumentError` outside of an `AutoManageCommitObjectProxy`."""
        found = _managing.get()
        if found is None:
            raise InvalidArgumentError(
                f"{type(self).__name__} is applied by an AutoManageCommitObjectProxy only, not by a plain proxy"
            )
        return found


class AutoManageCommitObjectProxy(CommitObjectProxy[T]):
    """A proxy of a managed object: inside, the object is on its device, with its commits; outside it has none of them.

    Commits are applied on the device, and undone from the backup that the host has anyway, so that weights are in
    memory once. Keywords are `sire.manage`'s.
    """

    def __init__(self, base: T | CommitObjectProxy[T], **kwargs: Any) -> None:
        super().__init__(base, revert_on_exit=True)
        from ._manage import manage

        self._wrapper = manage(self._object, **kwargs)
        self._entered: list[Any] = []

    @property
    def am(self) -> Any:
        """The object's `AutoManageWrapper`."""
        return self._wrapper

    def __enter__(self) -> T:
        from ._manage import auto_manage

        self._base.lock.acquire()
        managed = auto_manage(self._wrapper)
        try:
            managed.__enter__()
            try:
                self._enter(managed)
            except BaseException:
                self._base.keep_copies()
                managed.__exit__(None, None, None)
                raise
        finally:
            self._base.lock.release()
        return self._object

    def _enter(self, managed: Any) -> None:
        token = _managing.set(self._wrapper)
        try:
            with backups_serve(self._base.served):
                super().__enter__()
        finally:
            _managing.reset(token)
        self._entered.append(managed)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        managed = self._entered.pop()
        token = _managing.set(self._wrapper)
        try:
            # An outer plain proxy's commits stay; they have copies of their own.
            super().__exit__(kind, value, traceback)
        finally:
            _managing.reset(token)
            # Where a revert has failed, commits stay that have none.
            self._base.keep_copies()
            managed.__exit__(kind, value, traceback)

    def apply_commit_stack(self) -> T:
        """Refused: the object would have commits while it may be offloaded. Use the proxy as a context manager."""
        if self not in self._base.users:
            raise InvalidArgumentError("an AutoManageCommitObjectProxy applies its commits inside 'with proxy:' only")
        return super().apply_commit_stack()
