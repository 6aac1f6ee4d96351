"""Models larger than the GPU: layers that are on it while they are used, and in host memory or on the disk otherwise.

    from sire.memory import auto_manage_model

    manager = auto_manage_model(model)      # every nn.Linear leaves the GPU
    model = model.to("cuda")                # moves nothing of them
    output = model(x)                       # each layer comes when it is called
    manager.cleanup()                       # a plain, whole model

Parameters stay the same objects, `state_dict` has the same keys, training works. docs/memory.md is the guide.
"""

from __future__ import annotations

from .._units.readings import Usage
from .._units.residency import Event
from .._units.wrapping import ModuleWrapper
from ._config import MemoryConfig
from ._manager import (
    MemoryManager,
    auto_manage_model,
    create_memory_manager,
    wrap_model_layers,
    wrap_module,
)
from ._monitor import MemoryMonitor, MemoryStats
from ._strategies import CPUOffloadStrategy, DiskOffloadStrategy, OffloadStrategy, SmartOffloadStrategy

OffloadableModule = ModuleWrapper
"""Another name of `ModuleWrapper`."""

__all__ = [
    "CPUOffloadStrategy",
    "DiskOffloadStrategy",
    "Event",
    "MemoryConfig",
    "MemoryManager",
    "MemoryMonitor",
    "MemoryStats",
    "ModuleWrapper",
    "OffloadStrategy",
    "OffloadableModule",
    "SmartOffloadStrategy",
    "Usage",
    "auto_manage_model",
    "create_memory_manager",
    "wrap_model_layers",
    "wrap_module",
]
