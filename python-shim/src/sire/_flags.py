"""Environment variables that are yes or no, read as the library reads them (`cdylib/config.rs`)."""

from __future__ import annotations

import os

from ._errors import InvalidArgumentError

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def flag(name: str) -> bool:
    """Whether the variable says yes; unset means no, and what is neither is refused."""
    text = os.environ.get(name)
    if not text:
        return False
    said = _WORDS.get(text.lower())
    if said is None:
        raise InvalidArgumentError(f"{name} is {text!r}; it must be 1 or 0")
    return said
