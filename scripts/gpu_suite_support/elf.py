"""Reads what a shared library needs: the NEEDED entries and the newest glibc version that it asks for."""

from __future__ import annotations

import re
import struct
from pathlib import Path

_DYNAMIC, _NEEDED, _STRTAB, _STRSZ, _LOAD = 2, 1, 5, 10, 1


def needed(path: Path) -> list[str]:
    """The NEEDED entries of a 64-bit little-endian ELF file, in order; empty if it is something else."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + index * size) for index in range(count)]
    dynamic = next((header for header in headers if header[0] == _DYNAMIC), None)
    if dynamic is None:
        return []
    entries = [struct.unpack_from("<qQ", data, dynamic[2] + at) for at in range(0, dynamic[5], 16)]
    table = next((value for tag, value in entries if tag == _STRTAB), 0)
    for kind, _, file_offset, address, _, file_size, _, _ in headers:
        if kind == _LOAD and address <= table < address + file_size:
            table += file_offset - address
            break
    return [data[table + value : data.index(b"\0", table + value)].decode() for tag, value in entries if tag == _NEEDED]


def newest_glibc(path: Path) -> str | None:
    """The highest `GLIBC_x.y` named in the file."""
    found = {tuple(int(part) for part in match.split(b".")) for match in re.findall(rb"GLIBC_(\d+\.\d+)", path.read_bytes())}
    return "GLIBC_" + ".".join(str(part) for part in max(found)) if found else None
