"""The order in which vLLM's GPU worker allocates, sleeps and wakes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch

from vllm.device_allocator import get_mem_allocator_instance


class Worker:
    """Of one model; ``sleep_mode_backend`` is what the command line says."""

    def __init__(self, sleep_mode_backend: str) -> None:
        self._config = SimpleNamespace(sleep_mode_backend=sleep_mode_backend)
        self._backend: Any = None
        self._saved_buffers: dict[str, torch.Tensor] = {}

    def load_model(self, make: Callable[[], torch.nn.Module]) -> None:
        with self._pool("weights"):
            self.model = make()

    def initialize_kv_cache(self, make: Callable[[], torch.Tensor]) -> None:
        with self._pool("kv_cache"):
            self.kv_cache = make()

    def sleep(self, level: int = 1) -> None:
        torch.cuda.synchronize()
        free_before = torch.cuda.mem_get_info()[0]
        if level == 2:
            self._saved_buffers = {name: each.cpu().clone() for name, each in self.model.named_buffers()}
        self._chosen().suspend(level)
        assert torch.cuda.mem_get_info()[0] >= free_before

    def wake_up(self, tags: list[str] | None = None) -> None:
        self._chosen().resume(tags)
        for name, buffer in self.model.named_buffers():
            if name in self._saved_buffers:
                buffer.data.copy_(self._saved_buffers[name])
        self._saved_buffers = {}

    def _pool(self, tag: str) -> AbstractContextManager[None]:
        allocator = get_mem_allocator_instance()
        if tag == "weights":
            assert allocator.get_current_usage() == 0
        pool: AbstractContextManager[None] = allocator.use_memory_pool(tag=tag)
        return pool

    def _chosen(self) -> Any:
        if self._backend is None:
            from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

            self._backend = SleepModeBackendFactory.create_backend(self._config)
        return self._backend
