"""Packing what was found in a module into blocks: where each tensor's bytes are while the module is offloaded.

A block is one region of the library's and, as far as its bytes are not in files or in the library's keeping, one piece
of host memory, to which they move here. What happens to blocks afterwards is up to `_moving`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _library, _tensors
from ._packed import HostBlock, aligned, give_freed_memory_back
from ._pieces import Block, Piece, laid_out
from ._regions import Policy, make_policy
from ._sources import Source
from ._tensors import Found, Group


@dataclass(frozen=True)
class Terms:
    """How a module was asked to be adopted: `adopt` says what each means."""

    backup: str
    mode: str
    mutable: bool

    def shows_views(self, torch: Any, found: Found) -> bool:
        """Whether the tensor shows the host while the module is offloaded."""
        if self.mode == "auto":
            return not _tensors.keeps_graph(torch, found.tensor)
        return self.mode == "view"

    def policy(self, views: bool, in_files: bool) -> Policy:
        """That of a block's region."""
        if views:
            # For pauses that are not ours: they must not throw anything away.
            return make_policy("cpu", zero_fill=False, retain=False)
        # Hashes tell what has changed, also where PyTorch does not, and also to pauses that are not ours.
        verify = None if in_files else "hash"
        return make_policy("file" if in_files else self.backup, zero_fill=False, retain=False, verify=verify)


def pack(
    torch: Any, tag: bytes, terms: Terms, found: list[Found], source: Source | None, *, views: bool
) -> list[Block]:
    """The block of these tensors, which show host memory now as far as they are views; none of no bytes."""
    groups = _tensors.group(found)
    if not groups:
        return []
    pieces, size = laid_out(groups)
    if source is not None:
        source.give(pieces)
    region = _library.load().region_open(tag, *terms.policy(views, source is not None).fields())
    block = Block(pieces, size, views, region)
    need = [piece for piece in pieces if piece.host is None and (views or _must_move(torch, piece))]
    if need:
        block.host = HostBlock(sum(aligned(piece.size) for piece in need), on_disk=terms.backup == "disk")
    _move_to_host(torch, block, need, groups)
    return [block]


def _must_move(torch: Any, piece: Piece) -> bool:
    """Whether bytes on the device go to the host, so that they are not there twice at the first load.

    Not where somebody else holds the place in autograd's graph: that does not survive another device.
    """
    tensors = [shown.tensor for shown in piece.shown]
    on_device = bool(tensors[0].device.type == "cuda")
    return on_device and not any(_tensors.keeps_graph(torch, each) for each in tensors)


def _move_to_host(torch: Any, block: Block, need: list[Piece], groups: list[Group]) -> None:
    """Piece by piece, so that what the module had before can go; memory on the device, when all is copied."""
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


def _tensors_of(pieces: list[Piece]) -> list[Any]:
    return [shown.tensor for piece in pieces for shown in piece.shown]


def _bytes(torch: Any, tensor: Any, group: Group) -> Any | None:
    """The bytes of a group, in the storage of one of its tensors; None of a tensor that has none (meta)."""
    if tensor.device.type == "meta":
        return None
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage(), group.start, (group.size,), (1,))
