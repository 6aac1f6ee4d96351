"""Moving the tensors of an adopted module to its device and back: the steps, which `_adopt` calls with its lock held.

Bringing is all or nothing: memory for every block first, then the bytes, then the tensors are shown there. Leaving goes
the other way about: bytes that have changed first, then the tensors, and the memory last. In between others may have
paused or resumed the tag; every step asks the library how things are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from . import _interrupt, _library, _subclasses, _torch
from ._arrivals import Arrival
from ._packing import Terms
from ._pieces import Block, shown_in
from ._placing import with_room

_lazy_pauses = [0]


def note_lazy_pause() -> None:
    """Somebody pauses lazily who is no adopted module: afterwards a paused tag whose memory is there may have been
    given back and brought back in between, without content.
    """
    _lazy_pauses[0] += 1


class Moving:
    """Blocks of one tag that come to a device, or go, together."""

    def __init__(self, torch: Any, index: int | None, encoded_tag: bytes, terms: Terms) -> None:
        self._torch = torch
        self._index = index
        self._encoded = encoded_tag
        self._terms = terms
        self._blocks: list[Block] = []
        self._others: list[_subclasses.Wrapped] = []
        self._loaded = False
        self._lazy = False
        self._lazy_pauses = 0
        self._arrival: Arrival | None = None
        self.bytes_copied = 0
        """Bytes that loads and offloads have copied between host and device, without those that the library copied."""

    @property
    def arriving(self) -> bool:
        """Whether its bytes are on their way (`begin`), while its tensors still show the host."""
        return self._arrival is not None and not self._loaded

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
                    with_room(partial(block.allocate, torch, library, self._index or 0))
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
        before = [
            (shown, shown.tensor.data) for block in self._blocks if not block.views for shown in shown_in([block])
        ]
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
                with self._or_mistrusted():
                    self._pause(lazy=False)
                self._lazy = False
            raise

    @contextmanager
    def _or_mistrusted(self) -> Iterator[None]:
        """If what is done inside fails, what the device has counts for nothing any more."""
        try:
            yield
        except BaseException:
            self._mistrust()
            raise

    def _mistrust(self) -> None:
        """The host's bytes are the ones that count: the next load copies all of them, whoever pauses and resumes
        meanwhile. Memory that is there all the same is given back by another offload.
        """
        for piece in [piece for block in self._blocks if block.views for piece in block.pieces]:
            piece.changed = True
        self._lazy = True

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
            with self._or_mistrusted():
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
                self.bytes_copied += block.fetch(torch, self._terms.mutable)
                if block.host is not None:
                    block.host.tidy()
        self._arrival = None
        try:
            self._show(torch, Block.show_host)
            self._pause(lazy, idle=after is not None)
        except BaseException:
            with suppress(Exception):
                self._stay(torch, library, lazy)
            raise
        self._loaded, self._lazy = False, lazy

    def _stay(self, torch: Any, library: _library.Library, lazy: bool) -> None:
        """After a pause that failed, or that Ctrl-C came too late for: offloaded if memory is away, else loaded.

        Views were named as dead: what the library has thrown away of them, its undo does not bring back. The
        host has it, and if the device cannot have it again, the module is offloaded although its memory is there.
        """
        self._loaded = False
        self._mistrust()
        if any(library.region_paused(block.region) for block in self._blocks):
            self._lazy = lazy
            return
        if any(block.device is None for block in self._blocks):  # it has just been taken over
            return
        try:
            for block in self._blocks:
                if block.views:
                    self.bytes_copied += block.fill(torch, block.pieces, non_blocking=False)
            self._show(torch, Block.show_device)
            self._loaded, self._lazy = True, False
        finally:
            if not self._loaded:
                self._show(torch, Block.show_host)
                self._mistrust()

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
        untouched = (
            self._lazy
            and self._lazy_pauses == _lazy_pauses[0]
            and all(library.region_paused(block.region) for block in held)
        )
        with self._or_mistrusted():
            report = self._resume(library)
        return not untouched or report["bytes_moved"] > 0

    def _wake(self) -> None:
        """Whoever paused the tag beside us made a backup."""
        if any(block.device is not None for block in self._blocks):
            self._resume(_library.load())

    def _resume(self, library: _library.Library) -> dict[str, Any]:
        def resume() -> dict[str, Any]:
            return _interrupt.run(lambda: library.resume(self._encoded, 0.0), library.cancel)

        return with_room(resume)

    def _pause(self, lazy: bool, idle: bool = False) -> None:
        if all(block.device is None for block in self._blocks):
            return
        library = _library.load()
        self._lazy_pauses = _lazy_pauses[0]
        # The host has these bytes, so that the library need not copy them.
        dead = [each for block in self._blocks if block.views for each in block.ranges()]
        _interrupt.run(lambda: library.pause(self._encoded, lambda _: dead, lazy=lazy, idle=idle), library.cancel)
