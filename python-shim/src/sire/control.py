"""Being asked from outside: safe points, and the socket through which the same user's processes list, pause, resume.

    with sire.control.open():             # or SIRE_CONTROL=1 in the environment
        for batch in batches:
            step(batch)
            sire.safe_point()             # here `sire pause PID` takes the memory, until `sire resume PID`

A safe point is a promise: until `sire.safe_point` returns, the calling thread uses no memory of a region. A program
that is paused from outside waits there until it is resumed. Threads that never pass one are not waited for, so a
thread that works on the device without safe points must not run beside one that has them. While the socket is open,
the end of each optimizer step is a safe point, and so are the beginning and the end of a use of managed models.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import logging
import os
import sys
import threading
import warnings
from types import TracebackType
from typing import Any

from . import _blocks, _callbacks, _hooks, _library, _torch
from ._errors import SireError
from ._flags import flag
from ._threads import starting

__all__ = ["Control", "close", "leave", "open", "safe_point"]

# Handlers of signals run between two slices.
_SLICE_SECONDS = 0.1
_PUBLISHER_SECONDS = 1.0
_EVENTS_SHOWN = 50
_BEFORE_PAUSE = 0

log = logging.getLogger("sire")

_turn = threading.RLock()
_opened = 0
_pid = 0
_path = ""
_openings = 0
# The process in which something may be away still although the socket is closed.
_owing_pid = 0
_hook: Any = None
# Who wants the steps of optimizers to be safe points: the socket, time slices.
_hook_wanted: set[str] = set()
# The process that takes turns on a device (`sire.time_slice`).
_turns_pid = 0
_here = threading.local()
# How many uses of managed objects each thread has under way.
_uses: dict[int, int] = {}
# Garbage may be collected by a thread that has it.
_counting = threading.RLock()
"""Of a thread: `uses` of managed objects, whether it is a `member` by safe points of its own, and `in_callbacks`."""


class Control:
    """A socket that is open until `close`, or the end of the ``with`` block; another `open` keeps it open."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._opening = _openings
        self._closed = False

    def close(self) -> None:
        """Nobody can ask any more, unless it was opened a second time. Repeating it is harmless."""
        if not self._closed:
            self._closed = True
            with _turn:
                # One that was closed for all, and opened anew since, is somebody else's.
                if self._opening == _openings:
                    _close_once()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open(*, step_hook: bool = True) -> Control:  # noqa: A001
    """Opens the control socket of this process, in the private directory of its user.

    ``step_hook``: the end of every step of PyTorch's optimizers is a safe point of the thread that makes it. Only
    where nothing else uses the device at that moment, which is so in ordinary training loops.
    """
    global _opened, _path, _pid, _openings
    library = _library.load()
    with _turn:
        if _pid != os.getpid():
            # Of a parent, before a fork.
            _opened, _pid = 0, os.getpid()
        if _opened == 0:
            _path = library.control_open()
        _opened += 1
        try:
            if _opened == 1:
                _openings += 1
                thread = threading.Thread(target=_publish, args=(library, _openings), name="sire-control", daemon=True)
                with starting():
                    thread.start()
            if step_hook:
                _hook_wanted.add("socket")
            torch_is_there()
            return Control(_path)
        except BaseException:
            # Nobody has it, so nobody could close it.
            _close_once()
            raise


def close() -> None:
    """Closes the socket, however often it was opened. What was paused from outside is resumed first."""
    global _opened
    with _turn:
        if _is_open():
            _opened = 1
            _close_once()


def _close_once() -> None:
    global _opened
    with _turn:
        if not _is_open():
            return
        _opened -= 1
        if _opened == 0:
            is_hooked = "socket" in _hook_wanted
            _unhook("socket")
            try:
                _library.load().control_close(told)
            except BaseException:
                if is_hooked:
                    _hook_wanted.add("owing")
                    torch_is_there()
                owes()
                raise


def owes() -> None:
    """Something may have to come back at a later safe point: they go on serving, also without the socket."""
    global _owing_pid
    _owing_pid = os.getpid()


def take_turns(yes: bool) -> None:
    """Whether safe points also serve time slices, with the socket or without it."""
    global _turns_pid
    with _turn:
        _turns_pid = os.getpid() if yes else 0
        if yes:
            _hook_wanted.add("turns")
            torch_is_there()
        else:
            _unhook("turns")


def _unhook(who: str) -> None:
    global _hook
    _hook_wanted.discard(who)
    if _hook is not None and not _hook_wanted:
        _hook.remove()
        _hook = None


def _is_open() -> bool:
    return _opened > 0 and _pid == os.getpid()


def _counts() -> bool:
    """Whether anybody could want anything at a safe point."""
    here = os.getpid()
    return (_opened > 0 and _pid == here) or here in (_turns_pid, _owing_pid)


@atexit.register
def _at_exit() -> None:
    global _opened, _owing_pid
    # The library removes its socket; nothing is resumed for a program that ends.
    _opened = _owing_pid = 0


# --- safe points -------------------------------------------------------------------------------------------------


def safe_point() -> None:
    """The calling thread uses no memory of a region until this returns: what was asked from outside happens now.

    If that was a pause, the call returns after the resume. Does nothing
    while a graph is being captured. An exception of a signal handler (Ctrl-C) is raised here, after everything that was
    paused from outside has been resumed; if that fails, it is raised all the same, with a note, and the memory stays
    paused. In another process's turn on the device (`sire.time_slice`) it is raised when the next turn has come, and a
    second one at once.
    """
    _here.member = True
    _pass()


def _pass() -> None:
    if not _counts() or _torch.capturing():
        return
    library = _library.load()
    blocks = _blocks.block_map()
    try:
        while library.safe_point(blocks, told, _SLICE_SECONDS):
            pass
    except SireError:
        raise
    except BaseException as interruption:
        _give_up(library, blocks, interruption)
        raise


def told(what: int, tag: str | None) -> bool:
    """Callbacks of `sire.before_pause` and `sire.after_resume`; whether none of them failed."""
    was_inside, _here.in_callbacks = in_callbacks(), True
    try:
        if what == _BEFORE_PAUSE:
            _callbacks.leaving(tag)
        else:
            _callbacks.resumed(tag)
    except Exception as error:
        log.warning("a callback failed at a safe point: %r", error)
        return False
    finally:
        _here.in_callbacks = was_inside
    return True


def in_callbacks() -> bool:
    """Whether the calling thread is in a callback of what is done at a safe point, and so keeps that from its end."""
    return getattr(_here, "in_callbacks", False)


def _give_up(library: _library.Library, blocks: _blocks.BlockMap | None, interruption: BaseException) -> None:
    try:
        library.control_give_up(told)
        if _is_away(library):
            log.warning(
                "interrupted in another process's turn on the device: waiting for the memory to be back (interrupt "
                "once more to go on without it)"
            )
            while library.safe_point(blocks, told, _SLICE_SECONDS):
                pass
    except BaseException as error:
        if hasattr(interruption, "add_note"):
            interruption.add_note(f"Sire: memory that was paused from outside stays paused: {error!r}")


def _is_away(library: _library.Library) -> bool:
    turns = library.time_slice()
    return turns is not None and turns["state"] != "resident"


def leave() -> None:
    """Pauses from outside do not wait for the calling thread any more, until it passes a safe point again."""
    _here.member = False
    if _library.is_loaded():
        _library.load().safe_point_leave()


def torch_is_there() -> None:
    """Hooks the steps of optimizers, also of those that exist already, if that is wanted and PyTorch is imported."""
    global _hook
    torch = _torch.loaded_torch() if _hook_wanted and _hook is None else None
    if torch is not None:
        # The package does not show its module of that name.
        optimizer = importlib.import_module("torch.optim.optimizer")
        _hook = optimizer.register_optimizer_step_post_hook(_after_step)


def _after_step(_optimizer: object, _args: object, _kwargs: object) -> None:
    if not _is_foreign():
        safe_point()


def _is_foreign() -> bool:
    """Whether Python did not start the calling thread, as autograd's: it works for one that waits for it."""
    return isinstance(threading.current_thread(), threading._DummyThread)


# --- uses of managed models --------------------------------------------------------------------------------------


def use_begins() -> None:
    """The calling thread is about to use managed objects; before the outermost use it is at a safe point."""
    if not _counts() or _is_foreign():
        return
    torch_is_there()
    here = threading.get_ident()
    if not _uses.get(here):
        _pass()
    with _counting:
        _uses[here] = _uses.get(here, 0) + 1


def use_ends(holder: int | None = None, collected: bool = False) -> None:
    """A use of the thread ``holder`` (default: the calling one) is over, as autograd's thread may say of it. After its
    own outermost use a thread is at a safe point, and then nobody waits for it. If that is said while garbage is
    ``collected``, which may be in the middle of anything, the thread's next safe point is the next one that it passes.
    """
    here = threading.get_ident()
    holder = here if holder is None else holder
    with _counting:
        left = _uses.pop(holder, 0) - 1
        if left > 0:
            _uses[holder] = left
    if left == 0 and holder == here and not collected and _counts():
        try:
            _pass()
        finally:
            if not getattr(_here, "member", False):
                _library.load().safe_point_leave()


# --- the environment ---------------------------------------------------------------------------------------------


def open_as_told() -> None:
    """SIRE_CONTROL=1 opens the socket with the library, as long as the process lives."""
    if not _is_open():
        try:
            if flag("SIRE_CONTROL"):
                open()
        except SireError as error:
            warnings.warn(f"SIRE_CONTROL: {error}", RuntimeWarning, stacklevel=3)


# --- what only this side knows -----------------------------------------------------------------------------------


def _publish(library: _library.Library, opening: int) -> None:
    """Answers questions about models as long as the socket is open; one that is opened anew has a thread of its own."""
    try:
        while _is_open() and _openings == opening:
            if library.control_wait(_PUBLISHER_SECONDS):
                library.control_publish(json.dumps(_figures(), default=str).encode())
    except SireError:
        # The library is closed, or this is the child of a fork: nobody asks.
        return


def _figures() -> dict[str, Any]:
    """Each part that is used shows itself; objects may come and go while they are counted: the next question counts
    again.
    """
    figures: dict[str, Any] = {"hook_mode": _hooks.known_hook_mode(), "models": None, "units": [], "events": []}
    if "sire.models" in sys.modules:
        from . import models

        try:
            figures["models"] = models.summary()
            figures["events"] += [vars(event) for event in models.events()[-_EVENTS_SHOWN:]]
        except Exception as error:
            figures["models"] = {"error": repr(error)}
    if "sire._units.everyone" in sys.modules:
        from ._units import everyone

        with contextlib.suppress(Exception):
            figures["units"] = everyone.standing()
            figures["events"] += everyone.events(_EVENTS_SHOWN)
    return figures
