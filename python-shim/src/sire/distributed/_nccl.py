"""NCCL beside pauses: its buffers, and its registrations of the program's.

NCCL holds device memory of its own, which no hook of Sire's sees, and keeps physical handles of buffers that it has
registered: a pause would free nothing of those, and a replay of a captured collective would use registrations of
memory that is gone. The first is what ``ncclCommSuspend`` is for, which PyTorch offers from 2.15 on; the second is
avoided by ``NCCL_GRAPH_REGISTER=0``, which has to be in the environment before the first communicator is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .._callbacks import Callback, after_resume, before_pause
from .._errors import UnsupportedError


def suspend_nccl(group: Any = None, *, tag: str | None = None) -> Suspension:
    """From now on NCCL's own memory for a process group (None: the default one) goes with each pause of ``tag``, and
    comes back with its resume.

    All ranks of the group must pause at the same time, as `pause` sees to: suspending waits for nobody, but a
    collective meanwhile would hang. Raises `UnsupportedError` if this PyTorch or the group's backend cannot suspend.
    ``remove()`` of the result takes it back.
    """
    backend = _backend(group)
    if not callable(getattr(backend, "suspend", None)) or not callable(getattr(backend, "resume", None)):
        raise UnsupportedError(
            f"{type(backend).__name__} of this PyTorch cannot be suspended (that takes PyTorch 2.15 with NCCL 2.30): "
            "its own memory stays on the device during a pause. Destroy the process group first if it is in the way."
        )
    suspension = Suspension(backend.suspend, backend.resume)
    suspension.callbacks = (
        before_pause(lambda _tag: suspension.suspend(), tag=tag),
        after_resume(lambda _tag: suspension.resume(), tag=tag),
    )
    return suspension


@dataclass
class Suspension:
    """What `suspend_nccl` has registered. Suspending what is suspended, and resuming what is not, does nothing."""

    _suspend: Callable[[], Any]
    _resume: Callable[[], Any]
    suspended: bool = False
    callbacks: tuple[Callback, ...] = field(default=(), repr=False)

    def suspend(self) -> None:
        """NCCL's memory goes, now."""
        if not self.suspended:
            self._suspend()
            self.suspended = True

    def resume(self) -> None:
        """NCCL's memory comes back, now."""
        if self.suspended:
            self._resume()
            self.suspended = False

    def remove(self) -> None:
        """Pauses do not concern NCCL any more; what is suspended is resumed."""
        for callback in self.callbacks:
            callback.remove()
        self.resume()


def _backend(group: Any) -> Any:
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise UnsupportedError("there is no process group: call torch.distributed.init_process_group first")
    group = group if group is not None else dist.group.WORLD
    return group._get_backend(torch.device("cuda"))
