"""Operations that CUDA has for half precision and the CPU has not: run in single precision and rounded afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
_MARKS = ("not implemented for 'Half'", "not implemented for 'BFloat16'", "not implemented for 'ComplexHalf'")


def call(run: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Run a CPU kernel, once more in a wider type if it does not know the narrow one."""
    try:
        return run(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if not any(mark in text for mark in _MARKS):
            raise
    return _widened(run, args, kwargs)


def _widened(run: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    narrow: list[tuple[torch.Tensor, torch.Tensor]] = []
    kinds: set[torch.dtype] = set()

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in _WIDER:
            wide = value.to(_WIDER[value.dtype])
            narrow.append((value, wide))
            kinds.add(value.dtype)
            return wide
        if isinstance(value, (list, tuple)):
            return [widen(item) for item in value]
        return value

    wide_args = [widen(value) for value in args]
    wide_kwargs = {name: widen(value) for name, value in kwargs.items()}
    for name in ("dtype", "out_dtype"):
        if wide_kwargs.get(name) in _WIDER:
            kinds.add(wide_kwargs[name])
            wide_kwargs[name] = _WIDER[wide_kwargs[name]]
    before = [wide._version for _, wide in narrow]
    result = run(*wide_args, **wide_kwargs)
    for (value, wide), version in zip(narrow, before, strict=True):
        if wide._version != version:
            if value.shape != wide.shape:
                value.resize_(wide.shape)
            value.copy_(wide)
    target = kinds.pop() if len(kinds) == 1 else torch.float16

    def shrink(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == _WIDER[target]:
            return value.to(target)
        if isinstance(value, (list, tuple)):
            return type(value)(shrink(item) for item in value)
        return value

    return shrink(result)
