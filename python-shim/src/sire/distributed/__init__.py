"""Pause and resume on all ranks of a job: `pause` and `resume`, all ranks or none; and what lets NCCL go along
(`suspend_nccl`).

    sire.distributed.pause("weights")      # on every rank; returns when all have paused
    sire.distributed.resume("weights")
"""

from __future__ import annotations

from ._nccl import suspend_nccl
from ._ranks import pause, resume

__all__ = ["pause", "resume", "suspend_nccl"]
