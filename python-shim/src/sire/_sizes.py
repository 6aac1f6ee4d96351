"""Sizes as people write them. Every size that enters the package is read here, once."""

from __future__ import annotations

import re

from ._errors import InvalidArgumentError

Size = int | str
"""Bytes, or a text such as ``"6GiB"``, ``"512MiB"``, ``"64k"``."""

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter + "b"] = 1000**_power

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_size(value: Size) -> int:
    """The number of bytes that ``value`` means.

    ``k``, ``m``, ``g``, ``t`` and ``KiB`` ... ``TiB`` count in 1024; ``KB`` ... ``TB`` count in 1000.
    Raises `InvalidArgumentError` for anything else: a size is never guessed.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidArgumentError(f"a size is an int or a text such as '6GiB', not {type(value).__name__}")
    if isinstance(value, int):
        return _checked(value, value)
    match = _PATTERN.fullmatch(value)
    unit = match and _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise InvalidArgumentError(f"{value[:40]!r} is not a size; write bytes, or for example '6GiB', '512MiB', '64k'")
    whole = int(match[1]) * unit if "." not in match[1] else round(float(match[1]) * unit)
    return _checked(whole, value)


def format_size(size: int) -> str:
    """``size`` for people: ``format_size(6 << 30) == "6.00 GiB"``."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{size} B" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} TiB"


def _checked(size: int, value: Size) -> int:
    if not 0 <= size < 1 << 63:
        raise InvalidArgumentError(f"the size {value!r} is outside 0 ... 2**63 - 1 bytes")
    return size
