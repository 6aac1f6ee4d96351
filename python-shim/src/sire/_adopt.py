"""Adopting a module: its tensors are packed into one allocation of a tag, and come and go together.

    adopted = adopt(model)            # offloaded: the model works on the CPU, from memory of ours
    adopted.load()                    # parameters are on the device, at the same addresses every time
    adopted.offload()                 # and back; what has not changed is not copied
    adopted.release()                 # an ordinary module again

This is what model managers are built on (`sire.manage`, `sire.memory`, `sire.slyce`): it moves one module when it is
told to, and knows no policy. Counting users, choosing who makes way and waiting for backward is up to them.

Two ways of being offloaded. As a *view*: the tensors' data is the host's copy, so ``device`` tells the truth and
``state_dict()`` works. *Paused*: tensors are left alone, and only their pages go, which is right for what is not plain
bytes (tensor subclasses) and where others rely on the tensors' device (DistributedDataParallel).

Without a device or without the library (``device=None``), everything works and the module stays on the CPU.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Literal

from . import _library, _owners, _requests, _subclasses, _tensors
from ._arrivals import Arrival, copy_stream
from ._errors import BusyError, InvalidArgumentError
from ._files import Path
from ._moving import Moving
from ._packing import Terms, pack
from ._pieces import Block, Piece, Shown, plainly, shown_in
from ._placing import device_index, refuse_capture, with_room
from ._sources import Source
from ._tags import encode_tag
from ._tensors import Found, Group

Backup = Literal["auto", "cpu", "disk"]
Mode = Literal["auto", "view", "paused"]
Release = Literal["eager", "lazy"]

# The share of a block that may belong to tensors that have left it.
_MOST_WASTED = 0.25


def adopt(
    module: Any,
    *,
    device: Any = None,
    backup: Backup = "auto",
    mode: Mode = "auto",
    priority: int = 0,
    mutable: bool = False,
    tag: str | None = None,
    source: Path | Iterable[Path] | None = None,
) -> Adopted:
    """Takes a module's parameters and buffers over; it is offloaded afterwards, wherever it was before.

    ``device`` is the CUDA device to load onto; None means the current one, or the CPU where there is no device or no
    library. ``backup`` says where the bytes are while the module is offloaded: ``"cpu"`` host memory, ``"disk"`` a file
    without a name, ``"auto"`` as the engine finds right (for views: host memory). ``mode`` is ``"view"`` or
    ``"paused"`` for all tensors; ``"auto"`` chooses for each. ``mutable`` says that the device's bytes are to be copied
    back at each offload. Without it, only those are that were written to as far as PyTorch or an optimizer tells, or
    that have a gradient, and buffers of up to 1 MiB; any other write through ``.data``, by ``torch._foreach_*`` or by a
    kernel of your own is not seen, and needs `Adopted.changed`. ``source`` names the safetensors files that hold the
    module's state, which then is read from there, and needs no host memory; the module may be on the device "meta".

    Device memory is taken at the first load: never more than the module has. Tied tensors stay tied, views stay views
    of one another, buffers that are not persistent come too. Tensors that another adopted module has are left to it,
    and loaded with it.

    Raises `InvalidArgumentError` if the module is adopted already, or the tag belongs to another one.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise InvalidArgumentError(f"adopt takes a torch.nn.Module, not {type(module).__name__}")
    _check("backup", backup, ("auto", "cpu", "disk"))
    _check("mode", mode, ("auto", "view", "paused"))
    index = device_index(torch, device)
    with ExitStack() as stack:
        tensors = [each.tensor for each in _tensors.find(module)]
        for bring in _owners.in_memory:
            stack.enter_context(bring(tensors))
        stack.enter_context(_owners.lock)
        known = adopted_by(module)
        if known is not None:
            raise InvalidArgumentError(f"this {type(module).__name__} is adopted already, with the tag {known.tag!r}")
        name = _owners.free_tag(tag, module)
        terms = Terms(backup, mode, bool(mutable) or _averages(torch, module))
        adopted = Adopted(torch, module, index, name, terms, int(priority))
        with plainly(torch):
            found = _tensors.find(module)
            adopted._take(found, None if source is None else Source(source))
            adopted._note_empty(found)
            adopted._place_empty("cpu")
        _owners.enter(adopted, module)
        _requests.install()
    return adopted


def adopted_by(module: Any) -> Adopted | None:
    """How the module is adopted; None if it is not."""
    return _owners.of_module(module)


class Adopted(Moving):
    """A module whose tensors come and go together. Methods may be called from any thread; one is served at a time."""

    def __init__(self, torch: Any, module: Any, index: int | None, tag: str, terms: Terms, priority: int) -> None:
        super().__init__(torch, index, encode_tag(tag), terms)
        self._module = weakref.ref(module)
        self._tag = tag
        self.priority = priority
        self._places: dict[int, tuple[Block, Piece, Shown]] = {}
        self._released = False
        self._lock = threading.RLock()
        self._shares: list[Adopted] = []
        self._brings_shares = False
        self._empty: list[Shown] = []

    # --- what can be asked ----------------------------------------------------------------------------------

    @property
    def tag(self) -> str:
        """Its tag in the library."""
        return self._tag

    @property
    def device(self) -> Any:
        """The device on which the module runs while it is loaded."""
        torch = self._torch
        return torch.device("cpu") if self._index is None else torch.device("cuda", self._index)

    @property
    def loaded(self) -> bool:
        """Whether the module can run on `device` now."""
        return self._loaded

    @property
    def nbytes(self) -> int:
        """Bytes that the module takes on the device when it is loaded."""
        return sum(block.size for block in self._blocks)

    @property
    def resident_bytes(self) -> int:
        """Bytes that it takes on the device now; what was released lazily counts as long as it is there."""
        if self._loaded or self.arriving or not self._lazy:
            return self.nbytes if self._loaded or self.arriving else 0
        regions = _library.load().stats()["regions"]
        return sum(int(regions[block.region]["resident_bytes"]) for block in self._blocks)

    @property
    def regions(self) -> tuple[int, ...]:
        """The library's numbers of its regions."""
        return tuple({block.region for block in self._blocks})

    @property
    def module(self) -> Any | None:
        """The module, while anybody uses it."""
        return self._module()

    @property
    def shares(self) -> tuple[Adopted, ...]:
        """Other adopted modules that have some of this one's tensors, and are loaded with it."""
        return tuple(each for each in self._shares if not each._released)

    @property
    def has_paused(self) -> bool:
        """Whether some of its tensors are in paused mode."""
        return any(not block.views for block in self._blocks)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The tensors that come and go with the module, as they hang in it."""
        return tuple(shown.tensor for shown in self._all_shown())

    def holds(self, tensor: Any) -> bool:
        """Whether the tensor lies in the memory that the module has on its device."""
        try:
            address = int(tensor.data_ptr()) if tensor.is_cuda else 0
        except (RuntimeError, NotImplementedError):  # one that has no memory to point at: fake, sparse, transformed
            return False
        ranges = [each for block in list(self._blocks) for each in block.ranges()]
        return any(start <= address < start + size for start, size in ranges)

    def wraps(self, tensor: Any) -> bool:
        """Whether the tensor is one that wraps others, which are this one's."""
        return any(other.tensor is tensor for other in self._others)

    @property
    def waits_for_backward(self) -> bool:
        """Whether a forward with gradients still wants its backward: offloading before that would break it."""
        return any(
            _tensors.keeps_graph(self._torch, shown.tensor)
            for block in self._blocks
            if block.views
            for piece in block.pieces
            for shown in piece.shown
        )

    def __repr__(self) -> str:
        where = "released" if self._released else "loaded" if self._loaded else "offloaded"
        return f"<sire adopted {self._tag!r}: {self.nbytes} bytes, {where}, {self.device}>"

    # --- coming and going -----------------------------------------------------------------------------------

    def load(
        self, non_blocking: bool = False, *, holding: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """Brings the module onto its device: all of it, or, if that fails, nothing, and the call can be repeated.

        With ``non_blocking`` the copies may still run on the current stream when the call returns. ``holding`` is
        entered while bytes come, when all regions of the tag are there. `OutOfMemoryError` if there is no room on the
        device.
        """
        with self._lock:
            self._require_adopted("load")
            if self._brings_shares:
                return  # of one that has tensors of this one, and this one of it
            self._bring_shares(non_blocking)
            if self._index is None:
                self._loaded = True
                return
            torch = self._torch
            refuse_capture("load")
            with torch.cuda.device(self._index), plainly(torch):
                self._sync()
                with holding():
                    if self._loaded:
                        self._wake()
                        self._join()
                    else:
                        self._come(torch, non_blocking)
                self._place_empty(self.device)

    def _bring_shares(self, non_blocking: bool) -> None:
        self._shares = list(self.shares)
        self._brings_shares = True
        try:
            for other in self._shares:
                other.load(non_blocking)
        finally:
            self._brings_shares = False

    def begin(self) -> bool:
        """Begins to bring the module: memory is taken now, bytes are copied on a stream of their own.

        Its tensors show the host until `load`, which makes the stream of its caller, not the caller, wait for these
        copies, and copies again what was written to meanwhile. False, and nothing was done, where there is nothing to
        begin, or no way to: without a device, where the module is loaded or begun already, for tensors in paused mode
        or of other modules. Errors are those of `load`.
        """
        with self._lock:
            self._require_adopted("begin to load")
            self._shares = list(self.shares)
            if self._index is None or self._loaded or self._arrival is not None:
                return False
            torch = self._torch
            refuse_capture("begin to load")
            with torch.cuda.device(self._index), plainly(torch):
                self._sync()
                if self._shares or not all(block.views for block in self._blocks):
                    return False
                with torch.cuda.stream(copy_stream(torch, self._index)):
                    self._bring(torch, self._stale_after(_library.load()), non_blocking=True, early=True)
                self._arrival, self._lazy = Arrival(torch, self._index, self._host_memory()), False
            return True

    def join(self) -> None:
        """The caller's stream sees the bytes of a loaded module, also if another stream waited for them (`begin`)."""
        with self._lock:
            self._join()

    def offload(self, release: Release = "eager", after: Iterable[Any] | None = None) -> None:
        """Takes the module off its device, bytes that have changed first.

        ``after`` are CUDA events: the caller vouches that what devices do with the module's memory is over when they
        have happened, and other work on the device goes on. None: the device is waited for.

        ``release="eager"`` gives the physical memory back at once. ``"lazy"`` leaves it until somebody in this process
        needs it; a load before that copies nothing that was not written to.
        """
        _check("release", release, ("eager", "lazy"))
        with self._lock:
            self._require_adopted("offload")
            if self._index is None:
                self._loaded = False
            elif self._loaded:
                torch = self._torch
                refuse_capture("offload")
                with torch.cuda.device(self._index), plainly(torch):
                    self._sync(bring=False)
                    self._go(torch, release == "lazy", None if after is None else list(after))
                    self._place_empty("cpu")
            elif self._arrival is not None:
                refuse_capture("offload")
                self._turn_back(lazy=release == "lazy")
            elif self._lazy and release == "eager":
                self._pause(lazy=False)
                self._lazy = False

    def sync(self) -> None:
        """Takes over what was hung into the module, or pointed elsewhere, since the last load or offload. What was
        taken out of it is nobody's afterwards, in host memory.

        They do that themselves; in between, this makes tensors that are elsewhere come to where the others are.
        """
        with self._lock:
            self._require_adopted("sync")
            if self._index is not None:
                torch = self._torch
                refuse_capture("sync")
                with torch.cuda.device(self._index), plainly(torch):
                    self._sync()

    def release(self) -> None:
        """Ends it: the module is an ordinary one again, on the device if it is loaded, else on the CPU."""
        with self._lock:
            if self._released:
                return
            if self._index is not None and not self._loaded and any(not block.views for block in self._blocks):
                # What the library keeps comes back to where the tensors say they are.
                self.load()
            if self.arriving:
                self._turn_back(lazy=False)
            self._await_arrival()
            if self._index is not None and self._lazy and not self._loaded:
                self._pause(lazy=False)
            self._released = True
            _owners.leave(self, self._module(), [shown.tensor for shown in self._all_shown()])
            self._blocks = []

    # --- single tensors -------------------------------------------------------------------------------------

    def changed(self, *tensors: Any) -> None:
        """Says that tensors (all, if none is named) were written to in a way that PyTorch does not count."""
        with self._lock:
            if self._index is not None:
                places = [self._place(each) for each in tensors] if tensors else list(self._places.values())
                for _, piece, _ in places:
                    piece.changed = True

    def host(self, tensor: Any) -> Any | None:
        """The tensor as host memory has it, as a CPU tensor; None if that is the library's, or the module's own.

        While the module is loaded and the tensor was not written to since, these are the same bytes as on the device;
        after a write they are those from before, until the next offload. Not to be written to.
        """
        torch = self._torch
        if self._index is None:
            return None
        with self._lock, plainly(torch):
            _, piece, shown = self._place(tensor)
            if piece.host is None:
                return None
            storage = piece.source(torch).untyped_storage()
            return torch.empty(0, dtype=shown.dtype, device="cpu").set_(storage, *shown.layout)

    def restore(self, *tensors: Any) -> None:
        """Undoes what was written to tensors on the device since the module was loaded: bytes come from the host again.

        Only while the module is loaded, and for tensors that have a `host` copy. Tensors with the same memory come
        along.
        """
        torch = self._torch
        with self._lock, plainly(torch):
            if not self._loaded or self._index is None:
                raise InvalidArgumentError(f"{self._tag!r} is not loaded on a device: there is nothing to restore")
            places = [self._place(each) for each in tensors]
            for block, piece in {id(piece): (block, piece) for block, piece, _ in places}.values():
                if piece.host is None:
                    raise InvalidArgumentError(f"tensors of {self._tag!r} in paused mode have no copy to restore from")
                self.bytes_copied += block.fill(torch, [piece], non_blocking=False)
                piece.settle()

    # --- adopting tensors -----------------------------------------------------------------------------------

    def _take(self, found: list[Found], source: Source | None) -> None:
        """Takes tensors over that hang in the module and are nobody's yet; they show host memory afterwards."""
        torch, terms = self._torch, self._terms
        mine = [each for each in found if not self._is_shared(each.tensor)]
        if source is not None:
            source.check(self._module(), mine)
        if self._index is None:
            if source is not None:
                source.fill_on_cpu(torch, mine)
            return
        plain = [each for each in mine if _tensors.is_plain(torch, each.tensor)]
        if len(plain) < len(mine):
            self._others += _subclasses.unwrap([each for each in mine if not _tensors.is_plain(torch, each.tensor)])
        views = [each for each in plain if terms.shows_views(torch, each)]
        paused = [each for each in plain if not terms.shows_views(torch, each)]
        paused += [inner for other in self._others for inner in other.fresh()]
        blocks = [
            *pack(torch, self._encoded, terms, views, source, views=True),
            *pack(torch, self._encoded, terms, paused, source, views=False),
        ]
        self._blocks += blocks
        self._note_places()
        for shown in shown_in(blocks):
            _owners.claim(self, shown.tensor)

    def _note_empty(self, found: list[Found]) -> None:
        """Tensors without elements need no memory, but are where the others are."""
        theirs = {id(shown.tensor) for other in self.shares for shown in other._empty}
        mine = [each for each in found if each.tensor.numel() == 0 and id(each.tensor) not in theirs]
        plain = [each for each in mine if self._index is not None and _tensors.is_plain(self._torch, each.tensor)]
        known = {id(shown.tensor) for shown in self._empty}
        shown = [each for each in plain if id(each.tensor) in known or self._terms.shows_views(self._torch, each)]
        self._empty = [Shown(each.tensor, each.slots, Group(0, 0)) for each in shown]

    def _place_empty(self, device: Any) -> None:
        memory = self._torch.empty(0, dtype=self._torch.uint8, device=device)
        for shown in self._empty:
            if shown.tensor.device != memory.device:
                shown.show(self._torch, memory)

    def _is_shared(self, tensor: Any) -> bool:
        owner = _owners.of_tensor(tensor)
        if owner is None or owner is self:
            return False
        if owner not in self._shares:
            self._shares.append(owner)
        return True

    def _sync(self, bring: bool = True) -> None:
        """Takes over what was hung into the module, or pointed elsewhere, since the last time, and parts with what was
        taken out of it. ``bring``: if the module is loaded, what is new comes, too.
        """
        module = self._module()
        if module is None:
            return
        found = _tensors.find(module)
        self._note_empty(found)
        inner = {id(tensor) for other in self._others for tensor in other.inner}
        known = {id(shown.tensor): shown for shown in self._all_shown() if id(shown.tensor) not in inner}
        wrapped = {id(other.tensor) for other in self._others}
        strangers = []
        for each in found:
            shown = known.pop(id(each.tensor), None)
            if shown is not None:
                shown.slots = each.slots
            if id(each.tensor) not in wrapped and (shown is None or not shown.is_ours()) and each.tensor.numel():
                strangers.append(each)
        _refuse_hollow(self._torch, strangers)
        if self._loaded and (known or strangers):
            self._wake()  # what moves is read
        gone = self._part_with(known) | {id(each.tensor) for each in strangers}
        strangers = [each for each in strangers if not self._is_shared(each.tensor)]
        if gone:
            self._replace(strangers, gone, bring and self._loaded)

    def _part_with(self, left: dict[int, Shown]) -> set[int]:
        """Tensors that have left the module are in host memory and nobody's; which of them, by identity. Those whose
        content the library has just now can do so when the module is loaded again.
        """
        torch = self._torch
        away = [block for block in self._blocks if self._is_away(block)]
        leaving = set(left) - {id(shown.tensor) for shown in shown_in(away)}
        if leaving and self._loaded:
            torch.cuda.synchronize(self._index)
            for block in self._blocks:
                self.bytes_copied += block.part_with(torch, leaving, self._terms.mutable)
        _owners.disown(self, [left[each].tensor for each in leaving])
        return leaving

    def _is_away(self, block: Block) -> bool:
        """Whether the library has the block's content just now, and nobody can read it."""
        return not self._loaded and not block.views and block.device is not None

    def _replace(self, strangers: list[Found], gone: set[int], bring: bool) -> None:
        """Forgets tensors, and takes others over. What is left in a block that has lost much moves to a new one."""
        if self.arriving:
            self._turn_back(lazy=False)
        self._await_arrival()
        others = len(self._others)
        blocks = self._pack_anew(strangers, gone)
        if bring:
            self._bring_new(blocks, others)

    def _pack_anew(self, strangers: list[Found], gone: set[int]) -> int:
        """Forgets tensors, and takes others over, with what is left in blocks that have lost much; how many blocks have
        stayed. Nobody keeps the memory of the others on the device afterwards.
        """
        for block in self._blocks:
            block.forget(gone)
        lost = [block for block in self._blocks if block.wasted > block.size * _MOST_WASTED]
        hollow = [block for block in lost if not self._is_away(block)]
        strangers = [Found(each.tensor, each.slots) for each in shown_in(hollow)] + strangers
        self._blocks = [block for block in self._blocks if block not in hollow]
        self._note_places()
        stayed = len(self._blocks)
        if strangers:
            self._take(strangers, None)
        return stayed

    def _bring_new(self, blocks: int, others: int) -> None:
        """Brings blocks after so many. Tensors of those that cannot come are strangers again, and so the call can be
        repeated.
        """
        torch, library = self._torch, _library.load()
        for at, block in enumerate(self._blocks[blocks:], blocks):
            try:
                with_room(partial(block.allocate, torch, library, self._index or 0))
                block.fill(torch, block.pieces, non_blocking=False)
                block.show_device(torch)
                self._hand_over(library, block)
            except BaseException:
                self._blocks, self._others = self._blocks[:at], self._others[:others]
                self._note_places()
                raise

    # --- looking things up ----------------------------------------------------------------------------------

    def _all_shown(self) -> list[Shown]:
        return shown_in(self._blocks)

    def _note_places(self) -> None:
        self._places = {
            id(shown.tensor): (block, piece, shown)
            for block in self._blocks
            for piece in block.pieces
            for shown in piece.shown
        }

    def _place(self, tensor: Any) -> tuple[Block, Piece, Shown]:
        place = self._places.get(id(tensor))
        if place is None or place[2].tensor is not tensor:
            raise InvalidArgumentError(
                f"a tensor of shape {tuple(tensor.shape)} is not one of those that {self._tag!r} was adopted with"
            )
        return place

    def _require_adopted(self, doing: str) -> None:
        if self._released:
            raise InvalidArgumentError(f"cannot {doing} {self._tag!r}: it was released; adopt the module again")


def _averages(torch: Any, module: Any) -> bool:
    """Whether some of its weights are averages of others, which PyTorch updates without counting it as a write."""
    return any(isinstance(each, torch.optim.swa_utils.AveragedModel) for each in module.modules())


def _refuse_hollow(torch: Any, strangers: list[Found]) -> None:
    """What is hung in shows what it has: tensors of a unit that is on the disk show what stands in for them."""
    holding: Any = sys.modules.get("sire._units.holding")
    for each in strangers if holding is not None else ():
        if _tensors.is_plain(torch, each.tensor) and holding.is_hollow(each.tensor):
            raise BusyError(
                f"a tensor of shape {list(each.tensor.shape)} was hung into an adopted module while it is on the disk "
                "(sire.memory, sire.slyce): load its own module first (load_all), and repeat the call"
            )


def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidArgumentError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}")
