"""The header of a safetensors file: which bytes are which tensor. Reads no content, and believes nothing.

Eight bytes of length (little-endian), that many bytes of JSON, then the content. Whatever is not as the format says is
an `InvalidArgumentError` that names the file and the tensor: lengths are bounded before anything is read, numbers are
small non-negative integers, ranges lie inside the file and do not overlap. (That a file has bytes which are no tensor's
is no reason to refuse it.)

The package ``safetensors`` hands out tensors, not the places of their bytes in the file; the tests use it as the twin
of this reader.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from dataclasses import dataclass
from typing import Any, TypeGuard

from ._errors import BackupIoError, InvalidArgumentError

LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin, counted from the start of the file."""
    size: int
    """Bytes."""

    @property
    def torch_dtype(self) -> str | None:
        """PyTorch's name of the dtype, such as ``"bfloat16"``; None if it has none."""
        return _TORCH_NAMES.get(self.dtype)


def read_header(path: str) -> dict[str, Entry]:
    """The tensors of the file by name. `BackupIoError` if it cannot be read, `InvalidArgumentError` if it is none."""
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InvalidArgumentError(f"{path} is not a regular file")
            text = _header_text(path, file, found.st_size)
            return parse_header(text, found.st_size, path)
    except OSError as error:
        raise BackupIoError(f"cannot read {path}: {error.strerror}") from error


def _without_waiting(path: str, flags: int) -> int:
    # Opening a pipe would wait for somebody who writes to it.
    return os.open(path, flags | os.O_NONBLOCK)


def _header_text(path: str, file: Any, size: int) -> bytes:
    front = file.read(8)
    if len(front) < 8:
        raise _refused(path, f"it has {size} bytes, fewer than the 8 of its header's length")
    length = int.from_bytes(front, "little")
    if length > size - 8:
        raise _refused(path, f"its header is said to have {length} bytes, but it ends {size - 8} bytes later")
    if length > LONGEST_HEADER:
        raise _refused(path, f"its header is said to have {length} bytes, more than {LONGEST_HEADER}")
    text = bytearray()
    while len(text) < length:
        part = file.read(length - len(text))
        if not part:
            raise _refused(path, f"it ends inside its header, after {len(text)} of {length} bytes")
        text += part
    return bytes(text)


def parse_header(text: bytes, file_size: int, path: str = "the file") -> dict[str, Entry]:
    """The tensors that a header describes, in a file of ``file_size`` bytes."""
    listed = _parsed(text, path)
    metadata = listed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused(path, "its __metadata__ is not a table of texts")
    content = 8 + len(text)
    entries = [_entry(path, name, each, content, file_size) for name, each in listed.items()]
    _refuse_overlaps(path, entries)
    return {entry.name: entry for entry in entries}


def _parsed(text: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        listed = json.loads(
            text.decode(), object_pairs_hook=unique, parse_int=_integer, parse_float=_never, parse_constant=_never
        )
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"its header is not JSON of the kind that is expected: {str(error)[:200]}") from None
    if not isinstance(listed, dict):
        raise _refused(path, "its header is not a table")
    return listed


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)


def _never(text: str) -> float:
    raise ValueError(f"{text[:20]} is not an integer")


def _entry(path: str, name: str, each: Any, content: int, file_size: int) -> Entry:
    def refused(why: str) -> InvalidArgumentError:
        return _refused(path, f"tensor {name[:200]!r}: {why}")

    if not isinstance(each, dict):
        raise refused("its description is not a table")
    dtype, shape, offsets = each.get("dtype"), each.get("shape"), each.get("data_offsets")
    if not isinstance(dtype, str):
        raise refused("it has no dtype")
    if not _are_sizes(shape):
        raise refused(f"its shape is {str(shape)[:100]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refused(f"its data_offsets are {str(offsets)[:100]}")
    begin, end = offsets
    if end > file_size - content:
        raise refused(f"its bytes end at {content + end}, but the file ends at {file_size}")
    if dtype in _BITS and math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise refused(f"{dtype} of shape {list(shape)[:10]} does not have {end - begin} bytes")
    return Entry(name, dtype, tuple(shape), content + begin, end - begin)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of integers that can be sizes."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 for value in values)
    )


def _refuse_overlaps(path: str, entries: list[Entry]) -> None:
    filled = sorted((entry for entry in entries if entry.size), key=lambda entry: entry.start)
    for one, other in itertools.pairwise(filled):
        if one.start + one.size > other.start:
            raise _refused(path, f"tensors {one.name[:200]!r} and {other.name[:200]!r} overlap")


def _refused(path: str, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path} is not a whole safetensors file: {why}")
