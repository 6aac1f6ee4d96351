"""Safetensors files that hold the state of a module which is being adopted: its tensors show the file's bytes.

The file is mapped, not read: pages come from it when they are copied to the device, and whoever writes to a tensor on
the host gets a page of its own. So the weights are in host memory only as far as the system's cache keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._errors import InvalidArgumentError
from ._files import Path, _entries, _Found
from ._packed import FileBlock
from ._pieces import Piece, Shown, laid_out
from ._tensors import Found, group


class Source:
    """Files by the names of their tensors."""

    def __init__(self, path: Path | Iterable[Path]) -> None:
        self._entries = _entries(path)
        self._blocks: dict[str, FileBlock] = {}

    def check(self, module: Any, found: list[Found]) -> None:
        """Raises unless the files have every tensor of the module's state, as it is there."""
        wanted = set(module.state_dict(keep_vars=True))
        problems = []
        for each in found:
            paths = [slot.path for slot in each.slots]
            why = [self._why_not(each.tensor, path) for path in paths]
            needed = any(path in wanted for path in paths) or each.tensor.device.type == "meta"
            if needed and all(why):
                problems.append(f"{paths[0]}: {why[0]}")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise InvalidArgumentError(
                f"the source does not hold {len(problems)} tensors of the module: {'; '.join(problems[:5])}{more}"
            )

    def give(self, pieces: list[Piece]) -> None:
        """Pieces that a file holds get its memory; what they had before is not asked for."""
        for piece in pieces:
            for shown in piece.shown:
                entry = self._entry_of(shown)
                if entry is not None and entry.entry.size == piece.size and _is_whole(shown, piece):
                    piece.host = self._memory(entry)
                    piece.file = (entry.path, entry.entry.start)
                    break

    def fill_on_cpu(self, torch: Any, found: list[Found]) -> None:
        """The same for tensors that nobody takes over: they stay on the CPU, with the file's bytes."""
        pieces, _ = laid_out(group(found))
        self.give(pieces)
        for piece in pieces:
            if piece.host is not None:
                piece.show_host(torch)

    def _memory(self, found: _Found) -> memoryview:
        if found.path not in self._blocks:
            self._blocks[found.path] = FileBlock(found.path)
        return self._blocks[found.path].piece(found.entry.start, found.entry.size)

    def _entry_of(self, shown: Shown) -> _Found | None:
        for slot in shown.slots:
            if self._why_not(shown.tensor, slot.path) is None:
                return self._entries[slot.path]
        return None

    def _why_not(self, tensor: Any, path: str) -> str | None:
        found = self._entries.get(path)
        if found is None:
            return "no file has it"
        entry = found.entry
        dtype = str(tensor.dtype).removeprefix("torch.")
        if (dtype, tuple(tensor.shape)) != (entry.torch_dtype, entry.shape):
            return f"it is {dtype} {list(tensor.shape)}, but {entry.dtype} {list(entry.shape)} in {found.path}"
        if not tensor.is_contiguous():
            return "it is not contiguous"
        if entry.start % tensor.element_size():
            return f"its bytes in {found.path} begin where no {dtype} can"
        return None


def _is_whole(shown: Shown, piece: Piece) -> bool:
    return bool(shown.tensor.numel() * shown.tensor.element_size() == piece.size)
