"""A drop-in for the package torch_memory_saver: its names and its interface, with Sire underneath.

    from sire.torch_memory_saver import torch_memory_saver

    with torch_memory_saver.region(enable_cpu_backup=True): ...
    torch_memory_saver.pause()
    torch_memory_saver.resume()

``from sire import torch_memory_saver`` gives this module, which answers to the same verbs. Programs that import
``torch_memory_saver`` itself: see `sire.compat`.
"""

from __future__ import annotations

import sys as _sys
import types as _types
from typing import Any as _Any

from ._saver import TorchMemorySaver, register_hook_mode, torch_memory_saver
from .hooks.mode_preload import configure_subprocess

__all__ = ["TorchMemorySaver", "configure_subprocess", "register_hook_mode", "torch_memory_saver"]


class _Module(_types.ModuleType):
    """The module, answering to the object's verbs and settings as well."""

    def __getattr__(self, name: str) -> _Any:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(torch_memory_saver, name)

    def __setattr__(self, name: str, value: _Any) -> None:
        if isinstance(getattr(TorchMemorySaver, name, None), property):
            setattr(torch_memory_saver, name, value)
        else:
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Module
