"""Helpers that programs import from that package."""

from __future__ import annotations

from pathlib import Path

import sire


def get_binary_path_from_package(stem: str) -> Path:
    """The library to preload; one serves every ``stem``."""
    return sire.library_path()
