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

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from . import _interrupt, _library, _owners, _requests, _subclasses, _tensors, _torch
from ._arrivals import Arrival, copy_stream
from ._errors import InvalidArgumentError
from ._files import Path
from ._packed import HostBlock, aligned, give_freed_memory_back
from ._pieces import Block, Piece, Shown, laid_out, plainly
from ._placing import device_index, refuse_capture, with_room
from ._regions import Policy, make_policy
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
    that have a gradient; a write through ``.data``, by ``torch._foreach_*`` or by a kernel of your own is not seen, and
    needs `Adopted.changed`. ``source`` names the safetensors
    files that hold the module's state, which then is read from there, and needs no host memory; the module may be on
    the device "meta".

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
    with _owners.lock:
        known = adopted_by(module)
        if known is not None:
            raise InvalidArgumentError(f"this {type(module).__name__} is adopted already, with the tag {known.tag!r}")
        name = _owners.free_tag(tag, module)
        adopted = Adopted(torch, module, index, name, (backup, mode, bool(mutable)), int(priority))
        with plainly(torch):
            adopted._take(_tensors.find(module), None if source is None else Source(source))
        _owners.enter(adopted, module)
        _requests.install()
    return adopted


def adopted_by(module: Any) -> Adopted | None:
    """How the module is adopted; None if it is not."""
    return _owners.of_module(module)


class Adopted:
    """A module whose tensors come and go together. Methods may be called from any thread; one is served at a time."""

    def __init__(
        self, torch: Any, module: Any, index: int | None, tag: str, terms: tuple[str, str, bool], priority: int
    ) -> None:
        self._torch = torch
        self._module = weakref.ref(module)
        self._index = index
        self._tag = tag
        self._encoded = encode_tag(tag)
        self._backup, self._mode, self._mutable = terms
        self.priority = priority
        self._blocks: list[Block] = []
        self._places: dict[int, tuple[Block, Piece, Shown]] = {}
        self._loaded = False
        self._lazy = False
        self._arrival: Arrival | None = None
        self._released = False
        self._lock = threading.RLock()
        self._shares: list[Adopted] = []
        self._others: list[_subclasses.Wrapped] = []
        self.bytes_copied = 0
        """Bytes that loads and offloads have copied between host and device, without those that the library copied."""

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
    def arriving(self) -> bool:
        """Whether its bytes are on their way (`begin`), while its tensors still show the host."""
        return self._arrival is not None and not self._loaded

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
        return tuple(self._shares)

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

    def load(self, non_blocking: bool = False) -> None:
        """Brings the module onto its device: all of it, or, if that fails, nothing, and the call can be repeated.

        With ``non_blocking`` the copies may still run on the current stream when the call returns. `OutOfMemoryError`
        if there is no room on the device.
        """
        with self._lock:
            self._require_adopted("load")
            for other in self._shares:
                other.load(non_blocking)
            if self._index is None:
                self._loaded = True
                return
            torch = self._torch
            refuse_capture("load")
            with torch.cuda.device(self._index), plainly(torch):
                self._sync()
                if self._loaded:
                    self._wake()
                    self._join()
                else:
                    self._come(torch, non_blocking)

    def begin(self) -> bool:
        """Begins to bring the module: memory is taken now, bytes are copied on a stream of their own.

        Its tensors show the host until `load`, which makes the stream of its caller, not the caller, wait for these
        copies, and copies again what was written to meanwhile. False, and nothing was done, where there is nothing to
        begin, or no way to: without a device, where the module is loaded or begun already, for tensors in paused mode
        or of other modules. Errors are those of `load`.
        """
        with self._lock:
            self._require_adopted("begin to load")
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
                    self._sync()
                    self._go(torch, release == "lazy", None if after is None else list(after))
            elif self._arrival is not None:
                refuse_capture("offload")
                self._turn_back(lazy=release == "lazy")
            elif self._lazy and release == "eager":
                self._pause(lazy=False)
                self._lazy = False

    def sync(self) -> None:
        """Takes over what was hung into the module, or pointed elsewhere, since the last load or offload.

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
            return torch.empty(0, dtype=shown.dtype).set_(storage, *shown.layout)

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
        torch = self._torch
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
        views = [each for each in plain if self._shows_views(each)]
        paused = [each for each in plain if not self._shows_views(each)]
        paused += [inner for other in self._others for inner in other.fresh()]
        blocks = [
            *self._block(views, source, views=True),
            *self._block(paused, source, views=False),
        ]
        self._blocks += blocks
        self._note_places()
        for shown in _shown(blocks):
            _owners.claim(self, shown.tensor)

    def _is_shared(self, tensor: Any) -> bool:
        owner = _owners.of_tensor(tensor)
        if owner is None or owner is self:
            return False
        if owner not in self._shares:
            self._shares.append(owner)
        return True

    def _shows_views(self, found: Found) -> bool:
        if self._mode == "auto":
            return not _tensors.keeps_graph(self._torch, found.tensor)
        return self._mode == "view"

    def _block(self, found: list[Found], source: Source | None, *, views: bool) -> list[Block]:
        groups = _tensors.group(found)
        if not groups:
            return []
        pieces, size = laid_out(groups)
        if source is not None:
            source.give(pieces)
        region = _library.load().region_open(self._encoded, *self._policy(views, source is not None).fields())
        block = Block(pieces, size, views, region)
        need = [piece for piece in pieces if piece.host is None and (views or self._must_move(piece))]
        if need:
            block.host = HostBlock(sum(aligned(piece.size) for piece in need), on_disk=self._on_disk)
        self._move_to_host(block, need, groups)
        return [block]

    def _must_move(self, piece: Piece) -> bool:
        """Whether bytes on the device go to the host, so that they are not there twice at the first load.

        Not where somebody else holds the place in autograd's graph: that does not survive another device.
        """
        tensors = [shown.tensor for shown in piece.shown]
        on_device = bool(tensors[0].device.type == "cuda")
        return on_device and not any(_tensors.keeps_graph(self._torch, each) for each in tensors)

    def _move_to_host(self, block: Block, need: list[Piece], groups: list[Group]) -> None:
        """Piece by piece, so that what the module had before can go; memory on the device, when all is copied."""
        torch = self._torch
        for device in {each.device for each in _tensors_of(need) if each.is_cuda}:
            torch.cuda.synchronize(device)  # other streams may work on them
        wanted, before, at, freed = {id(piece) for piece in need}, [], 0, 0
        for piece, group in zip(block.pieces, groups, strict=True):
            original = _bytes(torch, piece.shown[0].tensor, group)
            if id(piece) in wanted and block.host is not None:
                piece.host, piece.packed = block.host.piece(at, piece.size), at == piece.offset
                at += aligned(piece.size)
                if original is not None:
                    piece.source(torch).copy_(original)
                    before.append(original if original.is_cuda else None)
            if piece.host is None:
                piece.origin = original
            else:
                piece.show_host(torch)
                freed += piece.size if original is not None and not original.is_cuda else 0
            del original
        if block.host is not None:
            block.host.tidy()
        give_freed_memory_back(freed)

    @property
    def _on_disk(self) -> bool:
        return self._backup == "disk"

    def _policy(self, views: bool, in_files: bool) -> Policy:
        if views:
            # For pauses that are not ours: they must not throw anything away.
            return make_policy("cpu", zero_fill=False, retain=False)
        # Hashes tell what has changed, also where PyTorch does not, and also to pauses that are not ours.
        verify = None if in_files else "hash"
        return make_policy("file" if in_files else self._backup, zero_fill=False, retain=False, verify=verify)

    # --- steps, with the lock held --------------------------------------------------------------------------

    def _come(self, torch: Any, non_blocking: bool) -> None:
        library = _library.load()
        stale = not self._has_arrived(library) and self._stale_after(library)
        made = self._bring(torch, stale, non_blocking, show=True)
        self._loaded, self._lazy = True, False
        if non_blocking:
            stream = torch.cuda.current_stream(self._index)
            self._arrival = Arrival(torch, self._index or 0, self._host_memory(), stream)
        for block in made:
            self._hand_over(library, block)

    def _bring(
        self, torch: Any, stale: bool, non_blocking: bool, *, show: bool = False, early: bool = False
    ) -> list[Block]:
        """Memory, bytes, and if that is asked for the tensors, all or nothing; the blocks whose memory is new.

        ``early``: while others may write to the tensors. What is written once a copy has begun is found later.
        """
        library = _library.load()
        with self._all_or_nothing(torch) as made:
            for block in self._blocks:
                if block.device is None:
                    with_room(torch, partial(block.allocate, torch, library, self._index or 0))
                    made.append(block)
            for block in self._blocks:
                self._fill(torch, block, stale or block in made, non_blocking, early)
            if show:
                self._show(torch, Block.show_device)
        return made

    @contextmanager
    def _all_or_nothing(self, torch: Any) -> Iterator[list[Block]]:
        """If what is done inside fails, the module is offloaded again; blocks that are named have no memory then."""
        made: list[Block] = []
        before = [(shown, shown.tensor.data) for block in self._blocks if not block.views for shown in _shown([block])]
        try:
            yield made
        except BaseException:
            self._arrival = None
            self._show(torch, Block.show_host)
            for shown, data in before:
                shown.point(torch, data)
            for block in made:
                block.drop()
            if len(made) < len(self._blocks):
                self._pause(lazy=False)
                self._lazy = False
            raise

    def _has_arrived(self, library: _library.Library) -> bool:
        """Whether the device has the bytes as soon as the caller's stream gets there."""
        if self._arrival is None:
            return False
        if any(library.region_paused(block.region) for block in self._blocks):
            # Whoever paused the tag meanwhile has a backup, which comes back as ever.
            self._arrival = None
            return False
        self._arrival.order()
        return True

    def _join(self) -> None:
        # Not in a capture: an event that is asked there makes it void.
        if self._loaded and self._arrival is not None and not _torch.capturing():
            if self._arrival.over:
                self._arrival = None
            else:
                self._arrival.order()

    def _turn_back(self, lazy: bool) -> None:
        """What was begun is given up."""
        if self._await_arrival():
            self._pause(lazy, idle=True)
            self._lazy = lazy

    def _await_arrival(self) -> bool:
        """No copy reads the host's memory or writes the device's any more; whether one could have."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None and not _torch.capturing():
            arrival.synchronize()
        return arrival is not None

    def _host_memory(self) -> list[Any]:
        """What copies read from."""
        return [piece.host for block in self._blocks for piece in block.pieces if piece.host is not None]

    def _fill(self, torch: Any, block: Block, stale: bool, non_blocking: bool, early: bool) -> None:
        """Copies what the device does not have (any more)."""
        if block.views:
            pieces = [piece for piece in block.pieces if stale or piece.dirty]
        else:
            pieces = [piece for piece in block.pieces if piece.host is not None or piece.origin is not None]
        if early:
            for piece in pieces:
                piece.settle()
        self.bytes_copied += block.fill(torch, pieces, non_blocking)

    def _hand_over(self, library: Any, block: Block) -> None:
        """What the library keeps from now on needs no copy of ours."""
        if block.views or block.device is None:
            return
        for piece in block.pieces:
            if piece.file is not None:
                path, start = piece.file
                library.attach_file(block.device.pointer + piece.offset, piece.size, path.encode(), start)
            piece.host = piece.origin = None
        block.host = None
        for other in self._others:
            other.show()

    def _go(self, torch: Any, lazy: bool, after: list[Any] | None) -> None:
        library = _library.load()
        if any(library.region_paused(block.region) for block in self._blocks):
            self._wake()
        if after is None:
            torch.cuda.synchronize(self._index)
        else:
            for each in (*after, *([] if self._arrival is None else [self._arrival])):
                each.synchronize()
        for block in self._blocks:
            if block.views:
                self.bytes_copied += block.fetch(torch, self._mutable)
                if block.host is not None:
                    block.host.tidy()
        self._arrival = None
        self._show(torch, Block.show_host)
        try:
            self._pause(lazy, idle=after is not None)
        except BaseException:
            self._show(torch, Block.show_device)
            raise
        self._loaded, self._lazy = False, lazy

    def _show(self, torch: Any, how: Any) -> None:
        for block in self._blocks:
            if block.views or (how is Block.show_device and block.device is not None):
                how(block, torch)

    def _stale_after(self, library: _library.Library) -> bool:
        """Brings the memory back; whether the content of views is undefined now."""
        held = [block for block in self._blocks if block.device is not None]
        if not held:
            # What was there is gone, but the tag may still be paused.
            if any(library.region_paused(block.region) for block in self._blocks):
                self._resume(library)
            return True
        untouched = self._lazy and all(library.region_paused(block.region) for block in held)
        report = self._resume(library)
        return not untouched or report["bytes_moved"] > 0

    def _wake(self) -> None:
        """Whoever paused the tag beside us made a backup."""
        if any(block.device is not None for block in self._blocks):
            self._resume(_library.load())

    def _resume(self, library: _library.Library) -> dict[str, Any]:
        def resume() -> dict[str, Any]:
            return _interrupt.run(lambda: library.resume(self._encoded, 0.0), library.cancel)

        return with_room(self._torch, resume)

    def _pause(self, lazy: bool, idle: bool = False) -> None:
        if all(block.device is None for block in self._blocks):
            return
        library = _library.load()
        # The host has these bytes, so that the library need not copy them.
        dead = [each for block in self._blocks if block.views for each in block.ranges()]
        _interrupt.run(lambda: library.pause(self._encoded, lambda _: dead, lazy=lazy, idle=idle), library.cancel)

    def _sync(self) -> None:
        """Takes over what was hung into the module, or pointed elsewhere, since the last time."""
        module = self._module()
        if module is None:
            return
        found = _tensors.find(module)
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
        gone = set(known) | {id(each.tensor) for each in strangers}
        strangers = [each for each in strangers if not self._is_shared(each.tensor)]
        if gone:
            self._replace(strangers, gone)

    def _replace(self, strangers: list[Found], gone: set[int]) -> None:
        """Forgets tensors, and takes others over. What is left in a block that has lost much moves to a new one."""
        torch = self._torch
        if self.arriving:
            self._turn_back(lazy=False)
        self._await_arrival()
        for block in self._blocks:
            block.forget(gone)
        hollow = [block for block in self._blocks if block.wasted > block.size * _MOST_WASTED]
        strangers = [Found(each.tensor, each.slots) for each in _shown(hollow)] + strangers
        self._blocks = [block for block in self._blocks if block not in hollow]
        self._note_places()
        if not strangers:
            return
        was = len(self._blocks)
        self._take(strangers, None)
        if self._loaded:
            library = _library.load()
            for block in self._blocks[was:]:
                with_room(torch, partial(block.allocate, torch, library, self._index or 0))
                block.fill(torch, block.pieces, non_blocking=False)
                block.show_device(torch)
                self._hand_over(library, block)

    # --- looking things up ----------------------------------------------------------------------------------

    def _all_shown(self) -> list[Shown]:
        return _shown(self._blocks)

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


def _shown(blocks: list[Block]) -> list[Shown]:
    return [shown for block in blocks for piece in block.pieces for shown in piece.shown]


def _tensors_of(pieces: list[Piece]) -> list[Any]:
    return [shown.tensor for piece in pieces for shown in piece.shown]


def _bytes(torch: Any, tensor: Any, group: Group) -> Any | None:
    """The bytes of a group, in the storage of one of its tensors; None of a tensor that has none (meta)."""
    if tensor.device.type == "meta":
        return None
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage(), group.start, (group.size,), (1,))


def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidArgumentError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}")
