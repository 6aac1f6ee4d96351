"""What a model is about to be called with, for estimators of the memory that this takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class InferenceContext:
    """The arguments of a call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


sire_inference_context: ContextVar[InferenceContext | None] = ContextVar("sire_inference_context", default=None)
"""The arguments of the call that loads are made for; None outside of one."""


def get_sire_inference_context() -> InferenceContext | None:
    """The arguments of the call that loads are made for; None outside of one."""
    return sire_inference_context.get()


@contextmanager
def sire_inference_context_manager(*args: Any, **kwargs: Any) -> Iterator[InferenceContext]:
    """Loads inside are made for a call with these arguments."""
    context = InferenceContext(args, kwargs)
    token = sire_inference_context.set(context)
    try:
        yield context
    finally:
        sire_inference_context.reset(token)
