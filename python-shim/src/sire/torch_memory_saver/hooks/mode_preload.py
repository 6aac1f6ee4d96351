"""Starting processes with the library preloaded, under that package's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sire

from .. import _saver


@contextmanager
def configure_subprocess() -> Iterator[None]:
    """Processes started inside have the library preloaded; not for custom modes that do without."""
    mode = _saver.torch_memory_saver.hook_mode
    custom = _saver._custom_modes.get(mode or "")
    if custom is not None and not custom.uses_preload:
        yield
        return
    with sire.configure_subprocess():
        yield


__all__ = ["configure_subprocess"]
