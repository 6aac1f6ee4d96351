"""Units in Sire's regions: exact-size memory on the device whose pages go and whose addresses stay.

What `holding` does with PyTorch alone, `sire._adopt` does with the library: the host's copy of what has not changed is
not made again, and a unit that leaves gives its memory to every process. Which of the two serves is decided once, when
the first unit meets a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from .. import _library
from .._errors import SireError, UnknownTagError
from .holding import Holding, Mover, size_of

_numbers = itertools.count(1)


class AdoptedTensors:
    """Tensors that `sire._adopt` moves. ``tag``: their tag in the library."""

    def __init__(self, tensors: Sequence[Any], device: Any, tag: str) -> None:
        import torch

        from .._adopt import adopt

        self.tensors = list(tensors)
        self._holder = torch.nn.Module()
        for number, each in enumerate(tensors):
            if isinstance(each, torch.nn.Parameter):
                self._holder.register_parameter(str(number), each)
            else:
                self._holder.register_buffer(str(number), each)
        self._adopted = adopt(self._holder, device=device, mode="view", tag=tag)

    @property
    def device(self) -> Any:
        """Where the memory is that they have now, also while the bytes are still on their way."""
        return self._adopted.device if self._adopted.arriving else self.tensors[0].device

    @property
    def arriving(self) -> bool:
        """Whether the bytes are on their way, while the tensors are still in host memory."""
        return self._adopted.arriving

    @property
    def device_bytes(self) -> int:
        """Bytes that loading takes on the device, gradients included."""
        gradients = (each.grad for each in self.tensors if each.is_leaf and each.grad is not None)
        return self._adopted.nbytes + sum(size_of(each) for each in gradients)

    def begin(self, device: Any) -> int | None:
        """Begins to bring everything, on a stream of its own; returns the bytes, None if that cannot be done."""
        begun: list[bool] = []
        copied = self._counted(lambda: begun.append(self._adopted.begin()))
        return copied if begun[0] else None

    def join(self) -> None:
        """The caller's stream sees what was brought, also if another stream waited for it."""
        self._adopted.join()

    def load(self, device: Any) -> int:
        """Brings everything to the device; returns the bytes that were copied."""
        return self._counted(self._adopted.load)

    def offload(self, after: Sequence[Any] | None = None) -> int:
        """Brings everything to host memory; returns the bytes that were copied."""
        return self._counted(lambda: self._adopted.offload(after=after))

    def release(self) -> None:
        """Leaves plain tensors where they are."""
        self._adopted.release()

    def _counted(self, move: Callable[[], object]) -> int:
        before = self._adopted.bytes_copied
        move()
        return self._adopted.bytes_copied - before


class Movers:
    """Makes a unit's mover: with the library where it serves, else with PyTorch alone. ``why_plain`` says why not."""

    def __init__(self, pin: bool = False, use_library: bool = True) -> None:
        self._pin = pin
        self.why_plain: str | None = None if use_library else "switched off"
        self.engine = "pytorch"
        """Who moves: ``"sire"`` once the library has served."""

    def for_unit(self) -> Callable[[Sequence[Any], Any], Mover]:
        """What makes the mover of one unit, again and again, under one tag if that can be."""
        tags: list[str] = []

        def make(tensors: Sequence[Any], device: Any) -> Mover:
            if device.type == "cuda" and self._served() and all(type(each) in _plain_types() for each in tensors):
                if not tags or not _can_be_entered(tags[0]):
                    tags[:] = [f"units/{next(_numbers)}"]
                self.engine = "sire"
                return AdoptedTensors(tensors, device, tags[0])
            return Holding(tensors, self._pin)

        return make

    def _served(self) -> bool:
        if self.why_plain is None:
            try:
                _library.load()
            except SireError as error:
                self.why_plain = str(error)
        return self.why_plain is None


def _can_be_entered(tag: str) -> bool:
    """Whether a tag can be used again, whose memory was released while it was paused."""
    try:
        _library.load().resume(tag.encode(), 0.0)
    except UnknownTagError:
        return True
    except SireError:  # somebody still has memory of it, and there is no room to bring it back
        return False
    return True


def _plain_types() -> tuple[type, ...]:
    import torch

    return (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
