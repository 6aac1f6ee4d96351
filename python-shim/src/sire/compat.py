"""Makes import lines written for other packages reach Sire, in this process.

    import sire.compat
    sire.compat.enable()
    from torch_memory_saver import torch_memory_saver

For processes that one cannot add a line to, the distribution ``sire-torch-memory-saver`` installs the module.
"""

from __future__ import annotations

import importlib
import sys

from ._errors import UnsupportedError

_THEIRS = "torch_memory_saver"
_OURS = "sire.torch_memory_saver"


def enable() -> None:
    """From now on ``import torch_memory_saver`` gives `sire.torch_memory_saver`. Repeating it is harmless."""
    present = sys.modules.get(_THEIRS)
    ours = importlib.import_module(_OURS)
    if present is ours:
        return
    if present is not None and not getattr(present, "__sire_compat__", False):
        raise UnsupportedError(
            f"{_THEIRS} is imported already, from {getattr(present, '__file__', '?')}; call "
            "sire.compat.enable() before anything imports it, or uninstall that package"
        )
    for suffix in ("", ".hooks", ".hooks.mode_preload", ".utils", ".testing_utils"):
        sys.modules[_THEIRS + suffix] = importlib.import_module(_OURS + suffix)
