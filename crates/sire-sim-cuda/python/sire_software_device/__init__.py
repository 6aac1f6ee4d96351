"""The Python part of the software CUDA device: aten operations for key CUDA, run by CPU kernels on the same bytes.

This module holds only what a program may ask (`install`, `installed`, `present`); importing it does not import torch.
Installation happens by itself right after `import torch` (see `hook`), and only where the CUDA runtime that torch loaded
is the software device's stand-in.
"""

from __future__ import annotations

import sys

__all__ = ["install", "installed", "present"]

_installed = False


def present() -> bool:
    """Whether the CUDA runtime in this process is the software device's stand-in."""
    from . import runtime

    return runtime.find() is not None


def installed() -> bool:
    """Whether the aten operations have been registered in this process."""
    return _installed


def _refuse_half_imported() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{__name__}.") and getattr(module.__spec__, "_initializing", False):
            raise ImportError(f"import torch before {name}: the operations are installed when torch is imported")


def install() -> bool:
    """Register the operations if the software device is present; harmless when repeated. Returns whether they are there."""
    global _installed
    if _installed:
        return True
    if not present():
        return False
    _refuse_half_imported()
    from . import registry

    registry.register()
    _installed = True
    return True
