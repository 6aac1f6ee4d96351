"""The reader of safetensors headers: what is right is read, everything else is refused with a reason.

The twin is the format's own package, where it is installed.
"""

from __future__ import annotations

import json
import os
import random
import string
from pathlib import Path
from typing import Any

import pytest
import sire
from sire._safetensors import Entry, parse_header, read_header

try:
    import safetensors
except ImportError:
    safetensors = None

SIZES = {"F32": 4, "BF16": 2, "U8": 1, "I64": 8, "BOOL": 1, "C64": 8}


def whole(header: Any, content: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def read(data: bytes) -> dict[str, Entry]:
    """As `read_header`, of bytes."""
    length = int.from_bytes(data[:8], "little")
    return parse_header(data[8 : 8 + length], len(data))


def tensor(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {"__metadata__": {"format": "pt"}, "a": tensor("BF16", [2, 3], [0, 12]), "b": tensor("U8", [], [12, 13])}
    path.write_bytes(whole(header, bytes(13)))
    start = path.stat().st_size - 13
    found = read_header(str(path))
    assert found == {"a": Entry("a", "BF16", (2, 3), start, 12), "b": Entry("b", "U8", (), start + 12, 1)}
    assert found["a"].torch_dtype == "bfloat16"
    assert read(whole({"new": tensor("F5_NEW", [3], [0, 2])}, bytes(2)))["new"].torch_dtype is None
    assert read(whole({})) == {}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "fewer than the 8"),
        (b"1234567", "fewer than the 8"),
        (whole({}, length=3), "ends 2 bytes later"),
        (whole({}, length=1 << 63), "header is said to have"),
        (whole(b"[]"), "not a table"),
        (whole(b"{"), "not JSON"),
        (whole(b"\xff\xff"), "not JSON"),
        (whole(b"[" * 100_000), "not JSON"),
        (whole(b'{"a": ' + b"9" * 5000 + b"}"), "too large"),
        (whole(b'{"a": 1.5}'), "not an integer"),
        (whole(b'{"a": NaN}'), "not an integer"),
        (whole(b'{"a": {}, "a": {}}'), "occurs twice"),
        (whole({"__metadata__": {"n": 1}}), "__metadata__"),
        (whole({"a": 7}), "not a table"),
        (whole({"a": tensor(dtype=7)}, bytes(4)), "no dtype"),  # type: ignore[arg-type]
        (whole({"a": tensor(shape=[-4])}, bytes(4)), "shape"),
        (whole({"a": tensor(shape=[True, 4])}, bytes(4)), "shape"),
        (whole({"a": tensor(shape="4")}, bytes(4)), "shape"),
        (whole({"a": tensor(shape=[1] * 65)}, bytes(4)), "shape"),
        (whole({"a": tensor(shape=[1 << 62, 1 << 62])}, bytes(4)), "does not have 4 bytes"),
        (whole({"a": tensor(shape=[5])}, bytes(4)), "does not have 4 bytes"),
        (whole({"a": tensor("F32")}, bytes(4)), "does not have 4 bytes"),
        (whole({"a": tensor(offsets=[0, 4, 8])}, bytes(8)), "data_offsets"),
        (whole({"a": tensor(offsets=[4, 0])}, bytes(8)), "data_offsets"),
        (whole({"a": tensor(offsets=[-4, 0])}, bytes(8)), "data_offsets"),
        (whole({"a": tensor(offsets=None)}, bytes(8)), "data_offsets"),
        (whole({"a": tensor()}, bytes(3)), "but the file ends at"),
        (whole({"a": tensor(), "b": tensor(offsets=[3, 7])}, bytes(7)), "overlap"),
    ],
)
def test_what_is_wrong_is_refused_and_named(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(sire.InvalidArgumentError, match=why) as caught:
        read_header(str(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sire.BackupIoError, match="No such file"):
        read_header(str(tmp_path / "none"))
    with pytest.raises(sire.BackupIoError):
        read_header(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(sire.InvalidArgumentError, match="regular file"):
        read_header(str(tmp_path / "pipe"))


def test_a_header_is_not_read_before_its_length_was_judged(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(sire.InvalidArgumentError, match="more than 100000000"):
        read_header(str(path))


def some_file(chance: random.Random) -> bytes:
    """A file as the format says, with random tensors."""
    header: dict[str, Any] = {}
    if chance.random() < 0.3:
        header["__metadata__"] = {"format": "pt"}
    at = 0
    for _ in range(chance.randrange(5)):
        dtype, shape = chance.choice(list(SIZES)), [chance.randrange(4) for _ in range(chance.randrange(4))]
        size = SIZES[dtype]
        for each in shape:
            size *= each
        name = "".join(chance.choices(string.ascii_letters + '."\\é', k=chance.randrange(1, 6)))
        header.setdefault(name, tensor(dtype, shape, [at, at + size]))
        at = max(each["data_offsets"][1] for key, each in header.items() if key != "__metadata__")
    return whole(header, chance.randbytes(at))


def broken(chance: random.Random, data: bytes) -> bytes:
    """The file with something wrong: cut, longer, a byte changed, digits exchanged."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(max(1, len(changed)))
        digits = [i for i, byte in enumerate(changed) if 48 <= byte < 58]
        match chance.randrange(5):
            case 0:
                del changed[at:]
            case 1:
                changed += chance.randbytes(chance.randrange(4))
            case 2 if changed:
                changed[at] = chance.choice(b'0123456789[]{},:"-e. \x00\xff')
            case 3 if digits:
                changed[chance.choice(digits)] = chance.choice(b"0123456789")
            case _:
                changed[at:at] = chance.choice([b"{", b"[", b"0", b'"', b"]"])
    return bytes(changed)


def check_ranges(data: bytes, found: dict[str, Entry]) -> None:
    """Naively: no byte of the content belongs to two tensors, and none lies outside."""
    owners: dict[int, str] = {}
    first = 8 + int.from_bytes(data[:8], "little")
    for entry in found.values():
        for at in range(entry.start, entry.start + entry.size):
            assert first <= at < len(data)
            assert owners.setdefault(at, entry.name) == entry.name


def twin(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the format's own package reads; None if it refuses."""
    try:
        found = safetensors.deserialize(data)
    except Exception:
        return None
    return {name: (each["dtype"], list(each["shape"]), bytes(each["data"])) for name, each in found}


def test_whatever_a_file_holds_it_is_read_rightly_or_refused() -> None:
    chance = random.Random(7)  # noqa: S311
    accepted = 0
    for _ in range(1500):
        data = some_file(chance)
        if chance.random() < 0.8:
            data = broken(chance, data)
        theirs = twin(data) if safetensors is not None else None
        try:
            found = read(data)
        except sire.SireError:
            assert theirs is None, data
            continue
        accepted += 1
        check_ranges(data, found)
        if theirs is not None:
            ours = {e.name: (e.dtype, list(e.shape), data[e.start : e.start + e.size]) for e in found.values()}
            assert ours == theirs
    assert 200 < accepted < 1300
