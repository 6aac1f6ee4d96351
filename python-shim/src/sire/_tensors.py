"""Which tensors a module has, and which of them share memory. Nothing here moves anything.

A *slot* is a place in a module where a parameter or a buffer hangs; tied tensors hang in several. A *group* is what
lies in one storage, views and all: its bytes go together or not at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Slot:
    """Where a tensor hangs: ``owner._parameters[name]`` or ``owner._buffers[name]``."""

    owner: weakref.ref[Any]
    table: str
    name: str
    path: str
    """The name in ``state_dict()``."""

    def put(self, tensor: Any) -> None:
        """Hangs another tensor there."""
        owner = self.owner()
        if owner is not None:
            getattr(owner, self.table)[self.name] = tensor


@dataclass(eq=False)
class Found:
    """A tensor of a module, and every slot in which it hangs."""

    tensor: Any
    slots: list[Slot] = field(default_factory=list)


@dataclass(eq=False)
class Group:
    """Tensors over one storage, and the part of it that they use, in bytes."""

    start: int
    end: int
    found: list[Found] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def find(module: Any) -> list[Found]:
    """The module's parameters and buffers, each once."""
    found: dict[int, Found] = {}
    for slot, tensor in _slots(module):
        found.setdefault(id(tensor), Found(tensor)).slots.append(slot)
    return list(found.values())


def _slots(module: Any) -> Iterator[tuple[Slot, Any]]:
    for prefix, owner in module.named_modules(remove_duplicate=True):
        reference = weakref.ref(owner)
        for table in ("_parameters", "_buffers"):
            for name, tensor in getattr(owner, table).items():
                if tensor is not None:
                    path = f"{prefix}.{name}" if prefix else name
                    yield Slot(reference, table, name, path), tensor


def is_plain(torch: Any, tensor: Any) -> bool:
    """Whether the tensor is bytes, and nothing but bytes, on the CPU, on a CUDA device, or nowhere yet (meta)."""
    kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return (
        type(tensor) in kinds
        and tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda", "meta")
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def group(found: list[Found]) -> list[Group]:
    """Plain tensors with bytes, by storage, in the order in which they were found."""
    groups: dict[tuple[Any, ...], Group] = {}
    for each in found:
        start, end = _reach(each.tensor)
        if start == end:
            continue
        together = groups.setdefault(_storage(each.tensor), Group(start, end))
        together.start, together.end = min(together.start, start), max(together.end, end)
        together.found.append(each)
    return list(groups.values())


def _storage(tensor: Any) -> tuple[Any, ...]:
    if tensor.device.type == "meta":
        return ("meta", id(tensor))
    return (str(tensor.device), tensor.untyped_storage().data_ptr())


def _reach(tensor: Any) -> tuple[int, int]:
    """The bytes of its storage between the tensor's first and its last element."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    size = tensor.element_size()
    # Down to where a tensor of any other dtype may begin.
    return int(first * size) // 16 * 16, int((first + last + 1) * size)


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """What is done inside is none of what ``torch.func`` transforms: tensors are moved, whoever asks for them."""
    import torch

    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def keeps_graph(torch: Any, tensor: Any) -> bool:
    """Whether something besides the tensor holds its place in autograd's graph: a forward whose backward has not come
    yet, or hooks on the accumulation of its gradient, as of DistributedDataParallel.

    PyTorch makes that place anew when nobody holds it; a mark on it tells the two apart.
    """
    # A tensor made in inference mode is in no graph, whatever it says.
    if not tensor.requires_grad or not tensor.is_leaf or tensor.is_inference():
        return False
    with outside_of_transforms(), torch.enable_grad():
        _accumulator(tensor).metadata["sire"] = True
        return bool(_accumulator(tensor).metadata.pop("sire", False))


def _accumulator(tensor: Any) -> Any:
    return tensor.view_as(tensor).grad_fn.next_functions[0][0]
