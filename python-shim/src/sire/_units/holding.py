"""Tensors that change places and stay the same objects.

A holding has the tensors of one module that are to move: parameters and buffers, with the gradients of the former.
Moving sets each tensor's ``data``, so that optimizers, tied modules, hooks and `state_dict` go on with the objects
they know, and ``tensor.device`` tells the truth. Tensors that share memory share it afterwards too. All or nothing:
room for everything is found before the first tensor changes.

`Holding` does it with PyTorch alone, on any device. `adopted` uses Sire's regions where the library serves this
process: addresses on the device stay, and what has not changed is not copied back.

A tensor whose content is on the disk is *hollow*: it has its shape and dtype, and every element is NaN. So only
floating-point tensors become hollow. PyTorch refuses to write to them, as elements share memory, but for filling them,
whole or in parts. A gradient that was filled (`zero_grad`) is what it was filled with when it comes back, row by row. A
weight is what it was, and the log says so: where one element stands in for many, who takes it for all of them may lose
a whole weight for one mask.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

logger = logging.getLogger("sire.memory")

# Less of a piece of memory than this share: what of its tensors overlaps is copied out of it instead of moving all.
_WORTH_MOVING_WHOLE = 0.5
# Bytes of the largest elements that there are.
_ALIGNMENT = 16

Make = Callable[[int], Any]


class Mover(Protocol):
    """What a unit needs of a holding."""

    tensors: list[Any]

    @property
    def device(self) -> Any:
        """Where the tensors are now."""

    @property
    def device_bytes(self) -> int:
        """Bytes that loading takes on the device."""

    @property
    def arriving(self) -> bool:
        """Whether the bytes are on their way, while the tensors are still in host memory."""

    def begin(self, device: Any) -> int | None:
        """Begins to bring everything; `load` completes that, and its caller's stream waits for the bytes. Returns how
        many are copied; None if that cannot be done, and nothing was.
        """

    def join(self) -> None:
        """The caller's stream sees what was brought, also if another stream waited for it."""

    def load(self, device: Any) -> int:
        """Brings everything to the device; returns the bytes that were copied."""

    def offload(self, after: Sequence[Any] | None = None) -> int:
        """Brings everything to host memory; returns the bytes that were copied. ``after``: CUDA events after which no
        device uses it any more; None: the device is waited for.
        """

    def release(self) -> None:
        """Leaves plain tensors where they are."""


class Holding:
    """Tensors moved with PyTorch alone. ``pin``: host memory that the driver knows, where there is a driver."""

    def __init__(self, tensors: Sequence[Any], pin: bool = False) -> None:
        self.tensors = list(tensors)
        self._pin = pin

    @property
    def device(self) -> Any:
        """Where the tensors are now."""
        import torch

        return self.tensors[0].device if self.tensors else torch.device("cpu")

    @property
    def device_bytes(self) -> int:
        """Bytes that loading takes on the device, gradients included."""
        return sum(size_of(each) for each in with_gradients(self.tensors))

    arriving = False
    """Never: what is copied is waited for."""

    def begin(self, device: Any) -> int | None:
        """Nothing."""
        return None

    def join(self) -> None:
        """Nothing."""

    def load(self, device: Any) -> int:
        """Brings everything to the device; returns the bytes that were copied."""
        return self._move(lambda size: _bytes_on(device, size))

    def offload(self, after: Sequence[Any] | None = None) -> int:
        """As `Mover.offload`: other streams may work on it, and PyTorch gives the memory to the next one at once."""
        import torch

        gpus = {each.device for each in self.tensors if each.device.type == "cuda"}
        if after is None:
            for gpu in gpus:
                torch.cuda.synchronize(gpu)
        for each in after or ():
            each.synchronize()
        return self._move(lambda size: _host_bytes(size, self._pin and bool(gpus)))

    def release(self) -> None:
        """Nothing to do: the tensors are plain ones."""

    def _move(self, make: Make) -> int:
        import torch

        with torch.inference_mode(False), torch.no_grad():  # else the tensors could not be trained any more
            moves = [move for group in _moving_together(with_gradients(self.tensors)) for move in _moved(group, make)]
            for tensor, data in moves:
                tensor.data = data
        return sum(size_of(tensor) for tensor, _ in moves)


def with_gradients(tensors: Sequence[Any]) -> list[Any]:
    """The tensors and what gradients they have."""
    return [*tensors, *(each.grad for each in tensors if each.is_leaf and each.grad is not None)]


def size_of(tensor: Any) -> int:
    """Bytes of the tensor's own elements."""
    return int(tensor.numel() * tensor.element_size())


def shared_memory(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """The tensors, those of the same memory together."""
    groups: dict[Any, list[Any]] = {}
    for each in tensors:
        storage = each.untyped_storage()
        groups.setdefault((str(each.device), storage.data_ptr() or id(each)), []).append(each)
    yield from groups.values()


def _moving_together(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """The tensors, those together that are most of one piece of memory or whose bytes overlap."""
    for group in shared_memory(tensors):
        if sum(size_of(each) for each in group) >= _WORTH_MOVING_WHOLE * group[0].untyped_storage().nbytes():
            yield group
        else:
            yield from _overlapping(group)


def _overlapping(group: list[Any]) -> list[list[Any]]:
    found: list[list[Any]] = []
    reached = 0
    for each in sorted(group, key=_start):
        if _start(each) < reached:
            found[-1].append(each)
        else:
            found.append([each])
        reached = max(reached, _start(each) + reach(each))
    return found


def _start(tensor: Any) -> int:
    return int(tensor.storage_offset() * tensor.element_size())


def reach(tensor: Any) -> int:
    """Bytes from the first element to the end of the last one."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def _span(group: Sequence[Any]) -> tuple[Any, int]:
    """The bytes of tensors of one piece of memory, and where in it they begin: at a multiple of every element."""
    import torch

    start = min(_start(each) for each in group) // _ALIGNMENT * _ALIGNMENT
    end = max(_start(each) + reach(each) for each in group)
    every = torch.empty(0, dtype=torch.uint8, device=group[0].device).set_(group[0].untyped_storage())
    return every[start:end], start


def _offset(tensor: Any, start: int) -> int:
    """Of a tensor in memory that begins at a byte of the one it is in."""
    return int(tensor.storage_offset() - start // tensor.element_size())


def _moved(group: list[Any], make: Make) -> Iterator[tuple[Any, Any]]:
    """Each tensor of what moves together, and its new data."""
    if len(group) == 1:
        (tensor,) = group
        fresh = over(make(size_of(tensor)), tensor, tensor.shape, 0, _dense_strides(tensor))
        fresh.copy_(tensor.data)
        yield tensor, fresh
        return
    old, start = _span(group)
    whole = make(len(old))
    whole.copy_(old)
    for tensor in group:
        yield tensor, over(whole, tensor, tensor.shape, _offset(tensor, start), tensor.stride())


def over(memory: Any, like: Any, shape: Sequence[int], offset: int, strides: Sequence[int]) -> Any:
    """A tensor of ``like``'s dtype over the bytes of another."""
    import torch

    empty = torch.empty(0, dtype=like.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), offset, shape, strides)


def _dense_strides(tensor: Any) -> tuple[int, ...]:
    """The tensor's own order of dimensions, without gaps (channels_last stays channels_last)."""
    import torch

    return tuple(torch.empty_like(tensor, device="meta").stride())


def _bytes_on(device: Any, size: int) -> Any:
    import torch

    return torch.empty(size, dtype=torch.uint8, device=device)


def _host_bytes(size: int, pin: bool) -> Any:
    import torch

    if pin:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # memory that may be locked ran out: slower copies are better than none
            pass
    return torch.empty(size, dtype=torch.uint8)


class Pieces:
    """The memory of floating-point CPU tensors as dense tensors, and how to make the tensors over such memory again.

    ``gradients`` are tensors, too, that may be filled while they are hollow.
    """

    def __init__(self, tensors: Sequence[Any], gradients: Sequence[Any] = ()) -> None:
        self.memory: list[Any] = []
        """Dense tensors; none while the tensors are hollow."""
        self._shapes: list[tuple[Any, Any]] = []
        self._parts: list[list[tuple[Any, Any, int, tuple[int, ...]]]] = []
        self._gradients = {id(each) for each in gradients}
        self._stand_ins: dict[int, Any] = {}
        for group in _moving_together([*tensors, *gradients]):
            if all(each.is_floating_point() or each.is_complex() for each in group):
                self._add(group)

    def _add(self, group: list[Any]) -> None:
        alone = len(group) == 1 and group[0].is_contiguous()
        whole, start = (group[0].detach(), _start(group[0])) if alone else _span(group)
        self.memory.append(whole)
        self._shapes.append((whole.shape, whole.dtype))
        self._parts.append([(each, each.shape, _offset(each, start), each.stride()) for each in group])

    def hollow(self) -> None:
        """Takes the tensors' memory away."""
        import torch

        tensors = [tensor for parts in self._parts for tensor, *_ in parts]
        with torch.inference_mode(False):  # else the tensors could not be trained any more
            self._stand_ins = {id(tensor): _stand_in(tensor) for tensor in tensors}
            for tensor in tensors:
                tensor.data = self._stand_ins[id(tensor)].expand(tensor.shape)
        self.memory = []

    def fresh(self) -> list[Any]:
        """Memory for the content, to be filled and given to `fill`."""
        import torch

        return [torch.empty(shape, dtype=dtype) for shape, dtype in self._shapes]

    def fill(self, memory: Sequence[Any]) -> None:
        """Makes the hollow tensors what they were, over this memory; one that somebody gave other data keeps that."""
        import torch

        self.memory = list(memory)
        stand_ins, self._stand_ins = self._stand_ins, {}
        with torch.inference_mode(False):
            for whole, parts in zip(memory, self._parts, strict=True):
                for tensor, shape, offset, strides in parts:
                    stand_in = stand_ins.get(id(tensor))
                    if stand_in is not None and tensor.data_ptr() == stand_in.data_ptr():
                        tensor.data = over(whole, tensor, shape, offset, strides)
                        self._add_what_was_filled(tensor, stand_in)

    def _add_what_was_filled(self, tensor: Any, stand_in: Any) -> None:
        filled = _filled(stand_in)
        if not filled.any():
            return
        if id(tensor) not in self._gradients:
            logger.warning(
                "a tensor of shape %s was written to while it was on the disk: that is lost. Write to it through "
                "load_state_dict, or load its module before",
                list(tensor.shape),
            )
        elif filled.all():
            tensor.data.copy_(stand_in.expand(tensor.shape))
        else:
            for row in filled.nonzero().flatten().tolist():
                tensor.data[row].copy_(stand_in[row].expand(tensor.shape[1:]))


# What stands in for hollow tensors now, by address.
_all_stand_ins: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _stand_in(tensor: Any) -> Any:
    """The elements that a hollow tensor shows: one for each row, or one for all where elements would not share it."""
    import torch

    share = tensor.numel() > 0 and tensor.shape[1:].numel() > 1
    rows = (tensor.shape[0], *[1] * (tensor.dim() - 1)) if share else ()  # never empty: what is has no address
    made = torch.full(rows, float("nan")).to(tensor.dtype)
    _all_stand_ins[made.data_ptr()] = made
    return made


def _filled(stand_in: Any) -> Any:
    """Which rows of what stood in for a tensor are not as they were made."""
    import torch

    as_made = torch.full((), float("nan")).to(stand_in.dtype)
    return (stand_in.reshape(-1, 1).view(torch.uint8) != as_made.reshape(1, 1).view(torch.uint8)).any(dim=1)


def is_hollow(tensor: Any) -> bool:
    """Whether the tensor's content is elsewhere."""
    return tensor.data_ptr() in _all_stand_ins
