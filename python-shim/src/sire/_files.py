"""Files that hold weights already, as backups of the memory they were loaded into.

The file's header says where each tensor's bytes are, PyTorch where they were loaded; the library is told of both, and
compares them at the next pause. What is equal needs no other backup.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _library
from ._errors import InvalidArgumentError
from ._safetensors import Entry, read_header
from ._sizes import format_size

Names = Mapping[str, str] | Callable[[str], str]
Path = str | os.PathLike[str]


@dataclass(frozen=True)
class FileBackup:
    """What `file_backup` found."""

    attached: tuple[str, ...]
    """Names of the tensors whose bytes a file is said to hold; tensors with the same memory once."""
    bytes_attached: int
    """Their bytes."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """The other tensors, and why they were left out."""
    unused: tuple[str, ...] = ()
    """Tensors of the files that nobody asked for."""

    def __str__(self) -> str:
        text = f"{len(self.attached)} tensors, {format_size(self.bytes_attached)}, are in files"
        return f"{text}, {len(self.skipped)} are not" if self.skipped else text


@dataclass(frozen=True)
class _Found:
    path: str
    entry: Entry


@dataclass(frozen=True)
class _Match:
    name: str
    tensor: Any
    found: _Found


def file_backup(
    tensors: Any, path: Path | Iterable[Path], *, names: Names | None = None, strict: bool = True
) -> FileBackup:
    """Says that a safetensors file holds the content of tensors; their region has ``backup="file"`` or ``"auto"``.

    ``tensors`` is a module (its state_dict is taken), a table from name to tensor, or pairs of both, such as
    ``model.named_parameters()``. ``path`` is a file or, of a model in several parts, all of them. ``names`` says how
    tensors are called in the file where that is another name: a table, or a function of the name.

    Nothing is believed: the next pause compares the file with the device's memory, and what is equal is not backed up
    anywhere else; a resume reads it from the file. What differs, and tensors that no file holds, go to host
    memory (``"auto"``: where there is room).

    A tensor that is in no file, or that has another dtype or shape there, or that cannot have a backup in a file (it is
    not contiguous, or not in a region) is an `InvalidArgumentError` that names it, and nothing is attached; with
    ``strict=False`` it is skipped, and the result says why. Tensors with the same memory (tied weights) need one of
    their names in the file.

    The files stay open. They may be renamed and removed, but not written to while the region is paused: then
    `sire.resume` raises `BackupIoError`, the region stays paused with everything else safe, and the
    call works once the file is as it was.
    """
    entries = _entries(path)
    named = _named(tensors)
    wanted = {name: _wanted(names, name) for name in named}
    matches: list[_Match] = []
    skipped: dict[str, str] = {}
    for group in _groups(named):
        match, problems = _matched(group, named, wanted, entries)
        if match is not None:
            matches.append(match)
        else:
            skipped.update(problems)
    if strict and skipped:
        raise InvalidArgumentError(_complaint(skipped))
    library = _library.load()
    for match in matches:
        entry = match.found.entry
        library.attach_file(match.tensor.data_ptr(), entry.size, os.fsencode(match.found.path), entry.start)
    unused = sorted(entries.keys() - set(wanted.values()))
    total = sum(match.found.entry.size for match in matches)
    return FileBackup(tuple(match.name for match in matches), total, skipped, tuple(unused))


def _entries(path: Path | Iterable[Path]) -> dict[str, _Found]:
    """What all files hold, by name."""
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    found: dict[str, _Found] = {}
    for each in paths:
        full = os.path.abspath(os.fspath(each))
        for name, entry in read_header(full).items():
            if name in found:
                raise InvalidArgumentError(f"tensor {name!r} is in {found[name].path} and in {full}")
            found[name] = _Found(full, entry)
    return found


def _named(tensors: Any) -> dict[str, Any]:
    """Tensors by name."""
    if callable(state_dict := getattr(tensors, "state_dict", None)):
        # With the parameters themselves; what a module keeps beside tensors has no bytes on a device.
        return {name: each for name, each in state_dict(keep_vars=True).items() if hasattr(each, "data_ptr")}
    try:
        found = dict(tensors)
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"file_backup takes a module, or tensors with their names, not {type(tensors).__name__}"
        ) from None
    for name, each in found.items():
        if not isinstance(name, str) or not hasattr(each, "data_ptr"):
            raise InvalidArgumentError(f"file_backup takes tensors by name, not {type(each).__name__} by {name!r}")
    return found


def _wanted(names: Names | None, name: str) -> str:
    if names is None:
        return name
    return names(name) if callable(names) else names.get(name, name)


def _groups(named: dict[str, Any]) -> list[list[str]]:
    """Names of tensors with bytes, those of the same memory together."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, tensor in named.items():
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.numel() * tensor.element_size())
            # Tensors without memory, such as those on the device "meta", are all at 0.
            groups.setdefault(key if key[0] else (0, id(tensor)), []).append(name)
    return list(groups.values())


def _matched(
    group: list[str], named: dict[str, Any], wanted: dict[str, str], entries: dict[str, _Found]
) -> tuple[_Match | None, dict[str, str]]:
    """The name of the group under which a file holds its bytes; else, what is wrong with each."""
    problems: dict[str, str] = {}
    for name in group:
        tensor, found = named[name], entries.get(wanted[name])
        why = _why_not(tensor, found, wanted[name])
        if why is None and found is not None:
            return _Match(name, tensor, found), {}
        problems[name] = why or ""
    return None, problems


def _why_not(tensor: Any, found: _Found | None, wanted: str) -> str | None:
    """Why the bytes of an entry cannot be a tensor's; None if they can."""
    if found is None:
        return f"no file has a tensor {wanted!r}"
    entry = found.entry
    dtype = str(tensor.dtype).removeprefix("torch.")
    if (dtype, tuple(tensor.shape)) != (entry.torch_dtype, entry.shape):
        return f"it is {dtype} {list(tensor.shape)}, but {entry.dtype} {list(entry.shape)} in {found.path}"
    if not tensor.is_cuda:
        return f"it is on {tensor.device}, not on a CUDA device"
    if not tensor.is_contiguous():
        return "it is not contiguous"
    return None if _library.load().owns(tensor.data_ptr()) else "it was not allocated in a region"


def _complaint(skipped: dict[str, str]) -> str:
    shown = [f"{name}: {why}" for name, why in list(skipped.items())[:5]]
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return (
        f"{len(skipped)} tensors cannot have their backup in a file: {'; '.join(shown)}{more}. Name them with names=, "
        "or leave them out with strict=False: then they are kept in host memory"
    )
