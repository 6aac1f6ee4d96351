"""Use of paused memory, found before it is an illegal address: ``SIRE_CHECK=1``, or inside `checked`.

A kernel that touches paused memory ends the process's CUDA context. While checking, every operation of PyTorch's is
looked at before it runs, by a dispatch mode: if one of its tensors lies in a region that is paused, `PausedError` is
raised instead. Operations that only make a view, or look at nothing but shape and dtype, are left alone. A dispatch
mode belongs to a thread: it is set in threads that use regions, in threads that `threading` starts afterwards, and
PyTorch itself hands it to the threads of a backward pass. Without checking nothing is installed, and nothing costs
anything.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from . import _library
from ._errors import PausedError, SireError, UnknownAddressError, UnsupportedError
from ._flags import flag

_METADATA = frozenset(
    f"aten::{name}"
    for name in (
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
        "full_like",
        "ones_like",
        "zeros_like",
        "rand_like",
        "randint_like",
        "randn_like",
        "is_pinned",
        "is_same_size",
        "record_stream",
        "_unsafe_view",
        "_reshape_alias",
    )
)
"""Operations that look at no byte of what they are given."""

Seen = Callable[[int], None]

_here = threading.local()


@functools.cache
def wanted() -> bool:
    """Whether the whole process is checked. Read once."""
    return flag("SIRE_CHECK")


@contextmanager
def checked() -> Iterator[None]:
    """Inside, in the calling thread and in backward passes that it starts, use of a paused tensor raises `PausedError`.

    For the whole process and all its threads: ``SIRE_CHECK=1``.
    """
    torch = _loaded_torch()
    if getattr(_here, "watching", False):
        yield
        return
    _follow_printing(torch)
    _here.watching = True
    try:
        with _mode_class()():
            yield
    finally:
        _here.watching = False


def install(torch: Any) -> None:
    """Checks the calling thread from now on, and those that it and others start. Nothing if it is being checked."""
    if getattr(_here, "watching", False):
        return
    from torch.utils import _python_dispatch

    _follow_threads(torch)
    if _python_dispatch._get_current_dispatch_mode_stack():
        # Whoever set that one takes the topmost off again, and would take ours: the next region tries again.
        return
    _follow_printing(torch)
    _here.watching = True
    _mode_class()().__enter__()


@contextmanager
def seen(note: Seen) -> Iterator[None]:
    """``note`` is told the address of every tensor that an operation of this thread is given, if it is checked."""
    before = getattr(_here, "note", None)
    _here.note = note
    try:
        yield
    finally:
        _here.note = before


def _loaded_torch() -> Any:
    from ._torch import loaded_torch

    torch = loaded_torch()
    if torch is None:
        raise UnsupportedError("checked looks at PyTorch's operations: import torch first")
    return torch


@functools.cache
def _mode_class() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        """Looks at what operations are given."""

        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            keywords = kwargs or {}
            if not harmless(func):
                require_usable(func, tensors((args, keywords)))
            return func(*args, **keywords)

    return Watch


def harmless(operation: Any) -> bool:
    """Whether the operation touches no byte of its arguments."""
    if getattr(operation, "is_view", False):
        return True
    schema = getattr(operation, "_schema", None)
    return schema is not None and schema.name in _METADATA


def tensors(arguments: Any) -> Iterator[Any]:
    """The plain CUDA tensors among arguments, and those inside of tensor subclasses."""
    import torch

    if isinstance(arguments, torch.Tensor):
        yield from _parts(arguments)
    elif isinstance(arguments, dict):
        for value in arguments.values():
            yield from tensors(value)
    elif isinstance(arguments, list | tuple):
        for value in arguments:
            yield from tensors(value)


def _parts(tensor: Any) -> Iterator[Any]:
    if type(tensor) is not _plain() and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    elif tensor.device.type == "cuda" and tensor.layout == _strided():
        yield tensor


@functools.cache
def _plain() -> Any:
    import torch

    return torch.Tensor


@functools.cache
def _strided() -> Any:
    import torch

    return torch.strided


def require_usable(operation: Any, found: Iterable[Any]) -> None:
    """Raises `PausedError` if the memory of one of the tensors is away."""
    library = _library.load()
    note: Seen | None = getattr(_here, "note", None)
    for tensor in found:
        address = _address(tensor)
        if address == 0 or not library.owns(address):
            continue
        try:
            library.require_usable(address)
            if note is not None:
                note(address)
        except PausedError as error:
            message = f"{operation} was given a tensor of shape {tuple(tensor.shape)}, but {error}"
            raise PausedError(
                f"{message}: sire.resume(tag). Checked because of SIRE_CHECK=1 or sire.checked()."
            ) from None
        except UnknownAddressError:
            # Freed, or the rounding of an allocation: nothing that a pause takes.
            continue


def _address(tensor: Any) -> int:
    """Where its first element is; 0 if it has no memory."""
    try:
        return int(tensor.data_ptr())
    except RuntimeError:
        return 0


_following = threading.Lock()
_followed: set[str] = set()


def _first(what: str) -> bool:
    with _following:
        is_first = what not in _followed
        _followed.add(what)
        return is_first


def _follow_printing(torch: Any) -> None:
    """Printing switches dispatch modes off, so it is asked by itself, in threads that are checked. Once."""
    if not _first("printing"):
        return
    original = torch._tensor_str._str

    @functools.wraps(original)
    def _str(self: Any, *args: Any, **keywords: Any) -> Any:
        if getattr(_here, "watching", False):
            require_usable("print", tensors(self))
        return original(self, *args, **keywords)

    torch._tensor_str._str = _str


def _follow_threads(torch: Any) -> None:
    """Threads that are started from now on are checked, too. Once."""
    if not _first("threads"):
        return
    original = threading.Thread.start

    @functools.wraps(original)
    def start(self: threading.Thread) -> None:
        run = self.run

        def checked_run() -> None:
            del self.run
            _quietly(lambda: install(torch))
            run()

        self.run = checked_run  # type: ignore[method-assign]
        try:
            original(self)
        except BaseException:
            self.__dict__.pop("run", None)
            raise

    threading.Thread.start = start  # type: ignore[method-assign]


def _quietly(call: Callable[[], None]) -> None:
    """A thread runs whether or not it can be checked."""
    try:
        call()
    except (ImportError, SireError):
        return
