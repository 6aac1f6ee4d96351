"""Which operations get which kernel, and their registration for dispatch key CUDA.

The list is PyTorch's own: what it registers for key CUDA, less what only handles metadata or allocation (kept native), plus
convolution, whose composite kernel chooses among CUDA backends. Operations that are composite for CUDA too stay untouched,
because their gradients come from their parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from . import capture, composed, copying, kernel

NATIVE = frozenset(
    "aten::" + name
    for name in (
        "_cudnn_init_dropout_state", "_cudnn_rnn_flatten_weight", "_efficientzerotensor", "_local_scalar_dense",
        "_nested_view_from_buffer",
        "_pin_memory", "_reshape_alias", "as_strided", "empty.memory_format", "empty_strided", "is_pinned", "is_set_to",
        "record_stream", "resize_", "set_", "set_.source_Storage", "set_.source_Storage_storage_offset",
        "set_.source_Tensor", "unfold", "view", "view_as_complex", "view_as_real",
    )
)  # fmt: skip
ADDED = ("aten::convolution", "aten::convolution_backward")

_library: Any = None


def candidates() -> list[str]:
    """The aten operations that PyTorch registers for key CUDA."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    return sorted(name for name in names if name.startswith("aten::"))


def has_cpu_kernel(qualified: str) -> bool:
    """Whether PyTorch can run the operation on CPU tensors."""
    return bool(torch._C._dispatch_has_computed_kernel_for_dispatch_key(qualified, "CPU"))


def _missing(qualified: str) -> Callable[..., NoReturn]:
    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{qualified} has no CPU kernel, so the software CUDA device cannot run it; use an operation that has one")

    return call


def kernels() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every operation with the function that will serve it."""
    for qualified in dict.fromkeys([*candidates(), *ADDED]):
        if qualified in NATIVE or qualified == "aten::copy_":
            continue
        own = composed.RUN.get(qualified)
        if qualified in composed.DIRECT:
            yield qualified, composed.DIRECT[qualified]
        elif own is not None or has_cpu_kernel(qualified):
            yield qualified, kernel.kernel(qualified, own)
        else:
            yield qualified, _missing(qualified)
    yield "aten::copy_", copying.copy_


def unsupported() -> list[str]:
    """The operations that fail by name here."""
    served = set(composed.RUN) | set(composed.DIRECT)
    return [q for q in candidates() if q not in NATIVE and q not in served and not has_cpu_kernel(q)]


def register() -> None:
    """Register all kernels, and choose PyTorch's backends so that it asks for no operation that only a GPU has."""
    global _library
    if _library is not None:
        return
    make_library: Any = torch.library.Library
    _library = make_library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for qualified, function in kernels():
            _library.impl(qualified, function, "CUDA")
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
    capture.install()
