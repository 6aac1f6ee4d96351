"""Makes import lines written for other packages reach Sire, in this process.

    import sire.compat
    sire.compat.enable()
    from torch_memory_saver import torch_memory_saver
    from memory_management import auto_manage_model
    from slyce import SlyceModel
    from torchtools import reserve_gpu_for_training

For processes that one cannot add a line to, the distribution ``sire-torch-memory-saver`` installs the first of these
modules.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from ._errors import UnsupportedError

_THEIRS = "torch_memory_saver"
_OURS = "sire.torch_memory_saver"
_SUBMODULES = ("", ".hooks", ".hooks.mode_preload", ".utils", ".testing_utils")
# These need PyTorch, so that they are imported when they are asked for.
_LATER = {
    "memory_management": "sire.memory",
    "slyce": "sire.slyce",
    "slyce.models": "sire.slyce.models",
    "torchtools": "sire.torchtools",
    "torchtools.device": "sire.torchtools.device",
    "torchtools.gpu_lock": "sire.torchtools.gpu_lock",
    "torchtools.gpu_scheduler": "sire.torchtools.gpu_scheduler",
}


def enable() -> None:
    """From now on ``torch_memory_saver``, ``memory_management``, ``slyce`` and ``torchtools`` are
    `sire.torch_memory_saver`, `sire.memory`, `sire.slyce` and `sire.torchtools`. Repeating it is harmless;
    `sire.UnsupportedError` if one of them is imported already from elsewhere.
    """
    for theirs, ours in {_THEIRS: _OURS, **_LATER}.items():
        _refuse_stranger(theirs, ours)
    if sys.modules.get(_THEIRS) is not sys.modules.get(_OURS) or _OURS not in sys.modules:
        for suffix in _SUBMODULES:
            sys.modules[_THEIRS + suffix] = importlib.import_module(_OURS + suffix)
    if not any(isinstance(each, _Later) for each in sys.meta_path):
        sys.meta_path.insert(0, _Later())


def _refuse_stranger(theirs: str, ours: str) -> None:
    present = sys.modules.get(theirs)
    if present is None or present is sys.modules.get(ours) or getattr(present, "__sire_compat__", False):
        return
    raise UnsupportedError(
        f"{theirs} is imported already, from {getattr(present, '__file__', '?')}; call "
        "sire.compat.enable() before anything imports it, or uninstall that package"
    )


class _Later:
    """Finds modules of ours under other names, when they are imported."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How to load one of the names; None of any other."""
        return ModuleSpec(name, self) if name in _LATER else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of ours, whose own description the import system is about to replace."""
        module = importlib.import_module(_LATER[spec.name])
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran already; its description is put back."""
        for theirs, ours in _LATER.items():
            if sys.modules.get(ours) is module and theirs in self._specs:
                module.__spec__ = self._specs[theirs]
