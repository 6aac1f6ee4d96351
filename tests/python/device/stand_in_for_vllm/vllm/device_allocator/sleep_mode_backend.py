"""The interface of a sleep-mode backend, and the registry that plugins add theirs to."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class SleepModeBackend(ABC):
    def __init__(self) -> None:
        self._state = "RUNNING"

    @abstractmethod
    def suspend(self, level: int = 1) -> None: ...

    @abstractmethod
    def resume(self, tags: list[str] | None = None) -> None: ...

    def state(self) -> str:
        return self._state

    def discard(self, tags: tuple[str, ...]) -> None:
        raise RuntimeError("not supported")

    @classmethod
    def is_supported(cls) -> bool:
        return True

    @classmethod
    def preserves_communicators(cls) -> bool:
        return False

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        return False

    @classmethod
    def preserves_graphs_with_communicators(cls) -> bool:
        return False

    @classmethod
    def supports_durable_storage(cls) -> bool:
        return False


class CuMemBackend(SleepModeBackend):
    """vLLM's default, which asks for the allocator each time."""

    def suspend(self, level: int = 1) -> None:
        from vllm.device_allocator import get_mem_allocator_instance

        get_mem_allocator_instance().sleep(offload_tags=("weights",) if level == 1 else ())

    def resume(self, tags: list[str] | None = None) -> None:
        from vllm.device_allocator import get_mem_allocator_instance

        get_mem_allocator_instance().wake_up(tags)


class SleepModeBackendFactory:
    _known: dict[str, Callable[[], Any]] = {}

    @classmethod
    def register_backend(cls, name: str, module_path: str, class_name: str) -> None:
        if name in cls._known:
            raise ValueError(f"{name} is registered")
        cls._known[name] = lambda: getattr(importlib.import_module(module_path), class_name)

    @classmethod
    def get_backend_class(cls, name: str) -> Any:
        if name not in cls._known:
            raise ValueError(f"{name} is not registered")
        return cls._known[name]()

    @classmethod
    def create_backend(cls, model_config: Any) -> Any:
        backend = cls.get_backend_class(model_config.sleep_mode_backend)
        if not backend.is_supported():
            raise ValueError("not supported")
        return backend()


SleepModeBackendFactory.register_backend("cumem", __name__, "CuMemBackend")
