"""vLLM's sleep mode on Sire's regions (docs/coming-from.md).

    SIRE_VLLM=1 vllm serve MODEL --enable-sleep-mode

vLLM finds `register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. It makes the
backend ``sire`` known to ``--sleep-mode-backend``, and with ``SIRE_VLLM=1`` has vLLM allocate weights and KV cache
through a `SireAllocator`. Importing this module imports neither vLLM nor PyTorch.
"""

from __future__ import annotations

from typing import Any as _Any

from ._allocator import SireAllocator
from ._plugin import BACKEND, register

__all__ = ["BACKEND", "SireAllocator", "SireBackend", "register"]


def __getattr__(name: str) -> _Any:
    if name == "SireBackend":  # its base class is vLLM's
        from ._plugin import require

        require()
        from ._backend import SireBackend

        return SireBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
