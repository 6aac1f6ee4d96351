"""Commits: changes to an object that can be taken back, such as LoRAs and function hooks. docs/commits.md is the guide.

base = CommitObjectProxy(model)
styled = base.clone_and_add_commit(LoraCommit("style.safetensors"))
with styled as model: ...      # the weights of the style
with base as model: ...        # the weights as they were, to the bit
"""

from __future__ import annotations

from ._commits import (
    AutoManageCommitObjectProxy,
    CallableCommit,
    CommitABC,
    CommitObjectProxy,
    CommitWithAutoManage,
)
from ._lora import LoraCommit
from ._optimizer import InferenceOptimizerCommit, InferenceOptimizerHook, OptimizationPlan, PrefetchInstruction
from ._weight_commits import HookCommit, WeightCommit

__all__ = [
    "AutoManageCommitObjectProxy",
    "CallableCommit",
    "CommitABC",
    "CommitObjectProxy",
    "CommitWithAutoManage",
    "HookCommit",
    "InferenceOptimizerCommit",
    "InferenceOptimizerHook",
    "LoraCommit",
    "OptimizationPlan",
    "PrefetchInstruction",
    "WeightCommit",
]
