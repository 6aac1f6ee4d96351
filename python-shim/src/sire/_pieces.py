"""The bytes of one storage of a module: where they are on the device, where in the host, and the tensors that show
them.

A *piece* is bytes, a *block* is pieces that share one allocation on the device. In a block of views the host memory is
ours, and tensors show it while they are offloaded; in any other block tensors stay on the device, and the
library keeps the content while the device's memory is away.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ._errors import InternalError
from ._packed import DeviceBlock, HostBlock, aligned, host_bytes
from ._tensors import Group, Slot, outside_of_transforms

# Bytes of a buffer that may be copied although nobody has written to it.
_LITTLE = 1 << 20


@contextmanager
def plainly(torch: Any) -> Iterator[None]:
    """Tensors made inside are ordinary ones, and nothing is recorded or transformed, whatever the caller's mode is."""
    with outside_of_transforms(), torch.inference_mode(False), torch.no_grad():
        yield


class Shown:
    """A tensor of the module and how it lies in its piece. Its identity never changes, its data does."""

    def __init__(self, tensor: Any, slots: list[Slot], group: Group) -> None:
        self.tensor = tensor
        self.slots = slots
        self.dtype = tensor.dtype
        self.layout = (
            tensor.storage_offset() - group.start // tensor.element_size(),
            tuple(tensor.shape),
            tuple(tensor.stride()),
        )
        self._in_inference = bool(tensor.is_inference())
        self._unseen = any(_is_written_unseen(slot, group.size) for slot in slots)
        self._seen = _version(tensor)
        self._address = _address(tensor)

    def show(self, torch: Any, memory: Any) -> None:
        """From now on the tensor's data, and its gradient's, is in the memory given as byte tensor."""
        self.point(torch, self.over(torch, memory))

    def over(self, torch: Any, memory: Any) -> Any:
        """The tensor that lies in this memory, given as byte tensor."""
        # A tensor made in inference mode that is given data of an ordinary one cannot be used as either.
        with torch.inference_mode(self._in_inference):
            return torch.empty(0, dtype=self.dtype, device=memory.device).set_(memory.untyped_storage(), *self.layout)

    def point(self, torch: Any, data: Any) -> None:
        """From now on this is the tensor's data."""
        if self.tensor.device.type == "meta":
            self._be_made(torch, data)
        gradient = self.tensor.grad
        if gradient is not None and gradient.device != data.device:
            gradient = gradient.to(data.device)
            # PyTorch checks a gradient against its tensor.
            self.tensor.grad = None
            self.tensor.data = data
            self.tensor.grad = gradient
        else:
            self.tensor.data = data
        self._address = _address(data)
        self.look()

    def _be_made(self, torch: Any, data: Any) -> None:
        """A tensor that was nowhere cannot be given data: another one takes its place."""
        made = data
        if isinstance(self.tensor, torch.nn.Parameter):
            made = torch.nn.Parameter(data, requires_grad=self.tensor.requires_grad)
        for slot in self.slots:
            slot.put(made)
        self.tensor = made

    def look(self) -> None:
        """What is written to the tensor from now on counts as new."""
        self._seen = _version(self.tensor)

    @property
    def written(self) -> bool:
        """Whether the tensor, or a view of it, may have been written to since `show` or `look`."""
        version = _version(self.tensor)
        return self._unseen or version is None or version != self._seen or self.tensor.grad is not None

    def is_ours(self) -> bool:
        """Whether the tensor still lies where `show` put it."""
        tensor = self.tensor
        lies = (tuple(tensor.shape), tuple(tensor.stride())) == self.layout[1:] and tensor.dtype == self.dtype
        return lies and _address(tensor) == self._address

    def is_on(self, device: Any) -> bool:
        """Whether the tensor lies where `show` put it on a device."""
        return self.tensor.device == device and self.is_ours()


def _is_written_unseen(slot: Slot, size: int) -> bool:
    """Buffers: PyTorch updates running statistics and observed ranges without counting it as a write, whoever has them.
    Those that lie in much memory are believed, but for the statistics of its own normalisation layers.
    """
    from torch.nn.modules.batchnorm import _NormBase

    return slot.table == "_buffers" and (size <= _LITTLE or isinstance(slot.owner(), _NormBase))


def _address(tensor: Any) -> int:
    return 0 if tensor.device.type == "meta" else int(tensor.data_ptr())


def _version(tensor: Any) -> tuple[int, int] | None:
    return None if tensor.is_inference() else (id(tensor), int(tensor._version))


@dataclass(eq=False)
class Piece:
    """The bytes of one storage, ``size`` of them at ``offset`` in their block."""

    size: int
    offset: int
    shown: list[Shown]
    host: memoryview | None = None
    """Where the bytes are in host memory; None if the library keeps them."""
    origin: Any = None
    """Before the first load of bytes that the library will keep: a byte tensor that has them."""
    file: tuple[str, int] | None = None
    """The file that has them, and from where on."""
    packed: bool = False
    """The host's bytes are at the piece's offset in the host memory of its block."""
    changed: bool = False
    """The host's bytes are not those of the device, whatever PyTorch says."""
    _lent: weakref.ref[memoryview] | None = None

    @property
    def dirty(self) -> bool:
        """Whether those who show the bytes may have written to them."""
        return self.changed or any(each.written for each in self.shown)

    def show_host(self, torch: Any) -> None:
        """Its tensors show the host's bytes."""
        self.show(torch, self.lend(torch))

    def lend(self, torch: Any) -> Any:
        """The host's bytes as a tensor; nothing is written to them while anybody has it."""
        # A piece of its own, so that one can tell whether somebody besides the module still uses it.
        lent = None if self._lent is None else self._lent()
        if lent is None:
            lent = self._memory()[:]
            self._lent = weakref.ref(lent)
        return host_bytes(torch, lent)

    def show(self, torch: Any, memory: Any) -> None:
        """Its tensors show these bytes."""
        self.changed = False
        for each in self.shown:
            each.show(torch, memory)

    def source(self, torch: Any) -> Any:
        """The bytes in host memory, as a tensor."""
        return self.origin if self.host is None else host_bytes(torch, self.host)

    def fetch(self, torch: Any, device: Any) -> None:
        """Copies the bytes from the device to the host; what somebody was shown before stays as it was."""
        if self._lent is not None and self._lent() is not None:
            self.host, self.packed, self._lent = HostBlock(self.size).piece(0, self.size), False, None
        host_bytes(torch, self._memory()).copy_(device)
        self.settle()

    def _memory(self) -> memoryview:
        if self.host is None:
            raise InternalError("bytes that the library keeps were asked for as host memory of the module's")
        return self.host

    def settle(self) -> None:
        """Host and device have the same bytes."""
        self.changed = False
        for each in self.shown:
            each.look()


@dataclass(eq=False)
class Block:
    """Pieces in one allocation on the device, ``size`` bytes; made at the first load."""

    pieces: list[Piece]
    size: int
    views: bool
    """Offloaded, its tensors show host memory."""
    region: int
    """The library's number of the region that the allocation is in."""
    host: HostBlock | None = None
    device: DeviceBlock | None = None
    memory: list[Any] = field(default_factory=list)
    """Of each piece, its bytes on the device as a tensor."""
    _datas: list[tuple[Shown, Any]] = field(default_factory=list)

    def allocate(self, torch: Any, library: Any, device: int) -> None:
        """Takes the memory on the device."""
        self.device = DeviceBlock(library, self.region, self.size, device)
        self.memory = [self.device.bytes(torch, piece.offset, piece.size) for piece in self.pieces]
        self._datas = [
            (shown, shown.over(torch, memory))
            for piece, memory in zip(self.pieces, self.memory, strict=True)
            for shown in piece.shown
        ]

    def drop(self) -> None:
        """Gives the memory on the device back, as soon as no tensor lies in it."""
        self.device, self.memory, self._datas = None, [], []

    def fill(self, torch: Any, pieces: Iterable[Piece], non_blocking: bool) -> int:
        """Copies pieces from the host to the device; how many bytes."""
        if self.host is not None:
            self.host.register(torch)
        wanted = {id(piece) for piece in pieces}
        if self.device is not None and self.host is not None and self._is_packed(wanted):
            whole = self.device.bytes(torch, 0, self.size)
            whole.copy_(host_bytes(torch, self.host.piece(0, self.size)), non_blocking=non_blocking)
            return sum(piece.size for piece in self.pieces)
        copied = 0
        for piece, memory in zip(self.pieces, self.memory, strict=True):
            if id(piece) in wanted:
                memory.copy_(piece.source(torch), non_blocking=non_blocking)
                copied += piece.size
        return copied

    def _is_packed(self, wanted: set[int]) -> bool:
        """Whether one copy brings all of it."""
        return all(id(piece) in wanted and piece.packed for piece in self.pieces)

    def fetch(self, torch: Any, everything: bool) -> int:
        """Copies what was written on the device, or all of it, to the host; how many bytes."""
        if self.device is None:
            return 0
        copied = 0
        for piece, memory in zip(self.pieces, self.memory, strict=True):
            if everything or piece.dirty:
                piece.fetch(torch, memory)
                copied += piece.size
        return copied

    def settle(self) -> None:
        """Host and device have the same bytes, or will have."""
        for piece in self.pieces:
            piece.settle()

    def show_device(self, torch: Any) -> None:
        """Its tensors show the device's bytes."""
        for piece in self.pieces:
            piece.changed = False
        for shown, data in self._datas:
            shown.point(torch, data)

    def part_with(self, torch: Any, leaving: set[int], everything: bool) -> int:
        """These tensors, by identity, show the host instead of the device; how many bytes were copied for that: what
        was written on the device, or all of them.
        """
        copied = 0
        for piece, memory in zip(self.pieces, self.memory, strict=True):
            shown = [each for each in piece.shown if id(each.tensor) in leaving and each.is_on(memory.device)]
            if not shown:
                continue
            if self.views and (everything or piece.dirty):
                piece.fetch(torch, memory)
                copied += piece.size
            host = piece.lend(torch) if self.views else memory.cpu()
            for each in shown:
                each.show(torch, host)
        return copied

    def forget(self, gone: set[int]) -> None:
        """These tensors, by identity, are not shown any more."""
        for piece in self.pieces:
            piece.shown = [each for each in piece.shown if id(each.tensor) not in gone]
        self._datas = [(shown, data) for shown, data in self._datas if id(shown.tensor) not in gone]

    def show_host(self, torch: Any) -> None:
        """Its tensors show the host's bytes."""
        for piece in self.pieces:
            piece.show_host(torch)

    @property
    def wasted(self) -> int:
        """Bytes of pieces that nobody shows any more."""
        return sum(piece.size for piece in self.pieces if not piece.shown)

    def ranges(self) -> list[tuple[int, int]]:
        """Its memory on the device."""
        return [] if self.device is None else [(self.device.pointer, self.size)]


def laid_out(groups: list[Group]) -> tuple[list[Piece], int]:
    """Pieces for the groups, one after the other, and the bytes of all."""
    pieces, at = [], 0
    for group in groups:
        shown = [Shown(found.tensor, found.slots, group) for found in group.found]
        pieces.append(Piece(group.size, at, shown))
        at += aligned(group.size)
    return pieces, at


def shown_in(blocks: list[Block]) -> list[Shown]:
    """All tensors that blocks hold."""
    return [shown for block in blocks for piece in block.pieces for shown in piece.shown]
