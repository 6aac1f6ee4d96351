"""Regions: where allocations are tagged, and where they are not.

Entering a region is two steps, undone in reverse: the library notes it for the calling thread, and PyTorch, if
it is loaded, is told to take the thread's tensors from the region's pool. Other threads, such as those that
run backward passes, are not inside.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

from . import _callbacks, _hooks, _library, _peers, _torch, _workspaces, control
from ._errors import InvalidArgumentError, UnsupportedError
from ._tags import encode_tag

Backup = Literal["cpu", "disk", "file", "auto"]
Verify = Literal["hash", "bytes"]
OnPaused = Literal["refuse", "resume"]

FILE = 3
_BACKUPS: dict[object, int] = {None: 0, "none": 0, "cpu": 1, "disk": 2, "file": FILE, "auto": 4}
_VERIFIES: dict[object, int] = {None: 0, "hash": 2, "bytes": 3}
_DECLARED = 1
_ON_PAUSED: dict[object, bool] = {"refuse": False, "resume": True}

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Policy:
    """A region's promise about its content, checked."""

    backup: int = 0
    zero_fill: bool = False
    retain: bool = False
    clean: int = 0
    pageable: bool = False
    whole: bool = False

    def fields(self) -> tuple[int, bool, bool, int, bool, bool]:
        """What the library takes beside the tag."""
        return (self.backup, self.zero_fill, self.retain, self.clean, self.pageable, self.whole)

    @property
    def in_files(self) -> bool:
        """Whether files of the program's hold the content."""
        return self.backup == FILE

    @property
    def declared(self) -> bool:
        """Whether the content is taken not to change, on trust."""
        return self.clean == _DECLARED


def make_policy(
    backup: object,
    zero_fill: bool,
    retain: bool,
    immutable: bool = False,
    verify: object = None,
    pageable: bool = False,
    whole: bool = False,
) -> Policy:
    """The policy, or `InvalidArgumentError`."""
    if not isinstance(backup, str | None) or backup not in _BACKUPS:
        raise InvalidArgumentError(f"backup is None, 'cpu', 'disk', 'file' or 'auto', not {backup!r}")
    if not isinstance(verify, str | None) or verify not in _VERIFIES:
        raise InvalidArgumentError(f"verify is None, 'hash' or 'bytes', not {verify!r}")
    clean = _VERIFIES[verify] or (_DECLARED if immutable else 0)
    if clean and not _BACKUPS[backup]:
        raise InvalidArgumentError("immutable and verify are about a backup that can be used again; name a backup too")
    return Policy(_BACKUPS[backup], bool(zero_fill), bool(retain), clean, bool(pageable), bool(whole))


class Region:
    """A region of the program: ``with region:`` in any thread, again and again, also inside itself.

    As a decorator, the region is open during each call of the function.
    """

    def __init__(self, tag: str, policy: Policy, resume_if_paused: bool, device: object) -> None:
        self._tag = tag
        self._encoded = encode_tag(tag)
        self._policy = policy
        self._resume_if_paused = resume_if_paused
        self._device = device
        self._here = threading.local()

    @property
    def tag(self) -> str:
        """The name that pause and resume use."""
        return self._tag

    @property
    def id(self) -> int:
        """The library's number of this (tag, policy)."""
        return _library.load().region_open(self._encoded, *self._policy.fields())

    @property
    def paused(self) -> bool:
        """Whether the region's memory is away."""
        return _library.load().region_paused(self.id)

    def __repr__(self) -> str:
        return f"<sire region {self._tag!r} {self._policy}>"

    def __enter__(self) -> Region:
        entered = self._open(routed=True)
        self._entries().append(entered)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entries = self._entries()
        if not entries:
            raise InvalidArgumentError(
                f"region {self._tag!r} is left in thread {threading.current_thread().name!r}, which did not enter it"
            )
        entries.pop().__exit__(kind, value, traceback)

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        if (
            inspect.iscoroutinefunction(function)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(
                f"{function!r} runs after its call returns, when the region is closed again; open it inside"
            )

        @functools.wraps(function)
        def inside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with self:
                return function(*args, **kwargs)

        return inside

    def _entries(self) -> list[ExitStack]:
        entries: list[ExitStack] | None = getattr(self._here, "entries", None)
        if entries is None:
            entries = self._here.entries = []
        return entries

    def _open(self, routed: bool) -> ExitStack:
        """Enters; the returned stack leaves. ``routed=False`` for a capture, which has a pool of its own."""
        _hooks.hook_mode()
        torch = _torch.ready_torch()
        control.torch_is_there()
        only = None
        if torch is not None:
            device = self._device_of(torch)
            _peers.introduce(torch, device)
            if routed:
                _workspaces.make_for_region(torch, device)
            if not _torch.whole_process_pluggable(torch):
                # PyTorch serves other devices from pools of its own, and goes on doing so after the region.
                only = device
        with ExitStack() as stack:
            stack.enter_context(self._entered(only))
            if torch is None:
                stack.push(_refuse_late_torch)
            elif routed:
                stack.enter_context(self._routed(torch))
            return stack.pop_all()

    @property
    def policy(self) -> Policy:
        """What happens to the content."""
        return self._policy

    def entered_for_capture(self) -> ExitStack:
        """Entered without a pool: a graph's capture brings its own."""
        return self._open(routed=False)

    @contextmanager
    def _entered(self, device: int | None) -> Iterator[None]:
        library = _library.load()
        region = self.id
        comes_back = self._resume_if_paused and library.region_paused(region)
        library.region_enter(region, device, self._resume_if_paused)
        try:
            if comes_back:
                _callbacks.resumed(self._tag)
            yield
        finally:
            library.region_leave(region)

    @contextmanager
    def _routed(self, torch: Any) -> Iterator[None]:
        if _torch.whole_process_pluggable(torch):
            _torch.probe_pluggable(torch)
            self._device_of(torch)
            yield
            return
        key, device = (self._tag, self._policy), self._device_of(torch)
        policy = self._policy
        with _torch.routed(torch, key, device, reused_is_changed=policy.declared, whole=policy.whole):
            yield

    def _device_of(self, torch: Any) -> int:
        return _torch.device_index(torch, self._device)


def _refuse_late_torch(kind: object, value: object, traceback: object) -> None:
    if kind is None and _torch.cuda_in_use() is not None:
        raise UnsupportedError(
            "PyTorch was imported and used inside a region that was entered without it, so its tensors are in no "
            "pool of the region. Import torch before the first region."
        )


def region(
    tag: str = "default",
    *,
    backup: Backup | None = None,
    zero_fill: bool = False,
    retain: bool = False,
    immutable: bool = False,
    verify: Verify | None = None,
    pageable: bool = False,
    whole: bool = False,
    on_paused: OnPaused = "refuse",
    device: Any = None,
) -> Region:
    """Memory that the calling thread allocates inside can be paused by its tag.

    ``tag`` is a path: pausing ``"model"`` also pauses ``"model/weights"``. ``backup`` says where the content
    goes during a pause: ``None`` throws it away, ``"cpu"`` keeps it in host memory, ``"disk"`` in a private file,
    ``"auto"`` where files of the program's hold it (`sire.file_backup` says which), else in host memory as long as
    there is room and then on the disk; what was used least recently makes way in the background. ``"file"``: in such
    files too, host memory the rest.
    ``zero_fill`` makes memory without backup read as zero after resume; otherwise it is undefined. ``retain``
    keeps the backup's space for the next pause.

    ``immutable`` promises that tensors are not written to once a pause has backed them up (weights): later pauses copy
    only tensors that are new, and `sire.changed` tells of exceptions. ``verify`` needs no promise: ``"hash"``
    compares a 128-bit hash of each page with the one of the backup, ``"bytes"`` the bytes themselves, and what
    differs is copied. Both keep the backup after a resume.

    ``pageable`` leaves the backup's host memory pageable instead of registering it with the driver: it does not count
    against what the process may lock, and copies are slower.

    ``whole`` makes each large allocation one piece of physical memory instead of several chunks: for buffers that a
    library registers with others by what the driver says of a pointer (NCCL, RDMA). PyTorch's expandable segments
    are in pieces that PyTorch chooses, so they and ``whole`` do not go together.

    Entering a paused region is an error, or with ``on_paused="resume"`` resumes it, as `sire.resume` does. With
    PyTorch, the region holds tensors of one ``device``: the current one unless given. What is made inside on another
    device is as outside; only where Sire is PyTorch's allocator (`sire.use_allocator`) the region holds that, too.
    """
    if on_paused not in _ON_PAUSED:
        raise InvalidArgumentError(f"on_paused is 'refuse' or 'resume', not {on_paused!r}")
    policy = make_policy(backup, zero_fill, retain, immutable, verify, pageable, whole)
    return Region(tag, policy, _ON_PAUSED[on_paused], device)


@contextmanager
def disable() -> Iterator[None]:
    """What the calling thread allocates inside is not tagged, also within regions, process-wide or opened inside."""
    library = _library.load()
    torch = _torch.ready_torch()
    library.region_suspend()
    try:
        if torch is None or _torch.whole_process_pluggable(torch):
            yield
        else:
            with _torch.unrouted(torch):
                yield
    finally:
        library.region_unsuspend()
