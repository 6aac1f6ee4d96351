"""What the interpreter runs at its start: waits for `import torch`, then installs the operations.

The accompanying `.pth` file imports this module in every process of the environment, spawned children included. Until torch
is imported it costs one entry in `sys.meta_path`; without the stand-in it does nothing more.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


class _TorchFinder:
    """Finds torch as usual, once, and runs `install` after its module body."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        if cls in sys.meta_path:
            sys.meta_path.remove(cls)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader = spec.loader if spec is not None else None
        if not isinstance(loader, importlib.machinery.SourceFileLoader):
            return spec
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            original(module)
            import sire_software_device

            sire_software_device.install()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "torch" in sys.modules:
    import sire_software_device

    sire_software_device.install()
elif _TorchFinder not in sys.meta_path:
    sys.meta_path.insert(0, _TorchFinder)
