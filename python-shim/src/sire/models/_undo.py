"""What tensors were before they were written to, and how to make them that again, to the bit.

Of a managed module on its device, the host's copy is what the tensors were, so that nothing has to be saved; that
holds as long as the module is not offloaded, which whoever says `backups_serve` sees to: what cannot be undone before
that is kept then. Of anything else a copy is saved in host memory. Weights that `sire.memory` has on the disk come to
memory before they are saved or written to.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from .._adopt import Adopted
from .._errors import InvalidArgumentError
from .._owners import of_tensor
from .._units import gradients

_serve: ContextVar[weakref.WeakSet[Undo] | None] = ContextVar("sire_backups_serve", default=None)


@contextmanager
def backups_serve(undos: weakref.WeakSet[Undo]) -> Iterator[None]:
    """What is saved inside is undone, or kept, before its module is offloaded, so that the host's copy of it can serve.

    ``undos`` are those for which it serves from now on.
    """
    token = _serve.set(undos)
    try:
        yield
    finally:
        _serve.reset(token)


@contextmanager
def at_hand(*tensors: Any) -> Iterator[None]:
    """The content of weights that are on the disk comes to memory, and does not leave it before the end."""
    with ExitStack() as stack:
        for tensor in tensors:
            found = gradients.owner(tensor)
            if found is not None:
                unit, residency = found
                with unit.lock:
                    unit.hold()
                    stack.callback(residency.release, unit, threading.get_ident())
                    unit.promote()
        yield


@contextmanager
def in_place(tensor: Any) -> Iterator[None]:
    """As `at_hand`, and nobody moves the weight from the host to its device or back meanwhile."""
    found = gradients.owner(tensor)
    if found is None:
        yield
        return
    unit, _ = found
    with unit.lock:
        unit.promote()
        unit.join()
        try:
            yield
        finally:
            unit.used_otherwise()


class Undo:
    """Saved tensors. Saving one twice keeps what it was first."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}
        self._clean: dict[int, tuple[Any, Adopted]] = {}
        self.bytes_saved = 0
        """Bytes of copies that were made."""

    def save(self, tensor: Any) -> None:
        """Remembers what the tensor is now."""
        if id(tensor) in self._copies or id(tensor) in self._clean:
            return
        undos = _serve.get()
        adopted = _with_clean_backup(tensor) if undos is not None else None
        if undos is not None and adopted is not None:
            self._clean[id(tensor)] = (tensor, adopted)
            undos.add(self)
            return
        with in_place(tensor):
            self._keep(tensor, tensor.detach().to("cpu", copy=True))

    def keep(self) -> None:
        """Host copies serve no longer: what they were needed for is copied. After an error it can be repeated."""
        for tensor, adopted in list(self._clean.values()):
            host = adopted.host(tensor)
            if host is None:
                raise InvalidArgumentError(f"the host has no copy of a tensor of {adopted.tag!r} any more")
            self._keep(tensor, host.clone())
            del self._clean[id(tensor)]

    def _keep(self, tensor: Any, copy: Any) -> None:
        self.bytes_saved += copy.numel() * copy.element_size()
        self._copies[id(tensor)] = (tensor, copy)

    def restore(self) -> None:
        """Makes all tensors what they were. After an error it can be repeated."""
        import torch

        with torch.no_grad():
            for tensor, adopted in self._clean.values():
                adopted.restore(tensor)
            for tensor, copy in self._copies.values():
                with in_place(tensor):
                    tensor.copy_(copy)

    def restore_after(self, error: BaseException) -> None:
        """As `restore`, of a change that failed. Where this fails too, the error says that the state is not known."""
        try:
            self.restore()
        except BaseException as second:
            told = error if isinstance(second, Exception) else second
            told.sire_state_unknown = (  # type: ignore[attr-defined]
                f"a commit failed ({error}), and what it had written to could not be restored ({second})"
            )
            if told is second:
                raise


def _with_clean_backup(tensor: Any) -> Adopted | None:
    """Who has a host copy that is equal to the tensor; None if nobody has. Compared, not believed."""
    import torch

    adopted = of_tensor(tensor)
    if adopted is None or not adopted.loaded or tensor.device.type != "cuda":
        return None
    try:
        host = adopted.host(tensor)
    except InvalidArgumentError:
        return None
    with torch.no_grad():
        same = host is not None and torch.equal(_bits(host), _bits(tensor.detach()).cpu())
    return adopted if same else None


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor
