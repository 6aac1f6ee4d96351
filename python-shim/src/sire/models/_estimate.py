"""How much device memory a call of a model takes beside its weights.

An estimate is a wish: room for it is made before the call, as far as objects that nobody uses can make way. A call is
not refused because the estimate was too high.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import contextmanager
from typing import Any

from .._errors import InvalidArgumentError
from .._sizes import parse_size
from ._context import get_sire_inference_context

Estimator = int | str | Callable[..., int] | Any


def estimated(estimator: Estimator | None, model: Any) -> int:
    """Bytes for the call that loads are made for now."""
    if estimator is None:
        return 0
    if isinstance(estimator, int | str) and not isinstance(estimator, bool):
        return parse_size(estimator)
    if isinstance(estimator, Profiler):
        return estimator.bytes
    if not callable(estimator):
        raise InvalidArgumentError(
            f"an inference_memory_estimator is bytes, a callable or a Profiler, not {type(estimator).__name__}"
        )
    context = get_sire_inference_context()
    args, kwargs = (context.args, context.kwargs) if context is not None else ((), {})
    return max(0, int(estimator(model, *args, **kwargs)))


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What the memory of a call depends on: shapes and dtypes of tensors, the types of everything else."""

    def of(value: Any) -> Hashable:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return (tuple(value.shape), str(value.dtype))
        if isinstance(value, list | tuple):
            return tuple(of(each) for each in value)
        if isinstance(value, dict):
            return tuple((str(name), of(each)) for name, each in sorted(value.items(), key=lambda item: str(item[0])))
        return type(value).__name__

    return (of(args), of(kwargs))


class Peak:
    """The most bytes of tensors that PyTorch had on a device during a block, beyond those at its beginning.

    Resets PyTorch's own peak (``torch.cuda.reset_peak_memory_stats``).
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self.bytes = 0

    def __enter__(self) -> Peak:
        import torch

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if self._device.type == "cuda":
            self.bytes = max(0, torch.cuda.max_memory_allocated(self._device) - self._before)


class LearnedEstimator:
    """Remembers what calls took, by the shapes of their inputs; what is new counts as the largest that is known."""

    def __init__(self, first: int | str = 0) -> None:
        self._first = parse_size(first)
        self._known: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def __call__(self, _model: Any, *args: Any, **kwargs: Any) -> int:
        with self._lock:
            largest = max(self._known.values(), default=self._first)
            return self._known.get(signature(args, kwargs), largest)

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> None:
        """A call with such arguments took so many bytes."""
        with self._lock:
            key = signature(args, kwargs)
            self._known[key] = max(size, self._known.get(key, 0))


def learned_estimator(first: int | str = 0) -> LearnedEstimator:
    """An estimator that measures each call of an `AutoManageHook` or a wrapper, and knows the next one with such
    inputs.

    ``first`` is what it says before it has seen any. Measuring resets PyTorch's peak statistics.
    """
    return LearnedEstimator(first)


class Profiler:
    """Measures what a call of a module takes: ``Profiler(module).run(*args)``, then itself an estimator."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.bytes = 0
        """The most that a run took beside the weights."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module, managed, and measures; returns what the module does."""
        from ._manage import auto_manage

        with auto_manage(self._module) as wrapper, Peak(wrapper.get_execution_device()) as peak:
            result = wrapper.call(*args, **kwargs)
        self.bytes = max(self.bytes, peak.bytes)
        return result


@contextmanager
def measuring(estimator: Any, device: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tells a learned estimator what the block took; others do not ask."""
    if not isinstance(estimator, LearnedEstimator):
        yield
        return
    with Peak(device) as peak:
        yield
    estimator.observe(args, kwargs, peak.bytes)
