"""Writes safetensors files by hand, so that the tests depend on the format and not on a package."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path

import torch

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def content(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes."""
    there = tensor.detach().cpu().contiguous()
    return ctypes.string_at(there.data_ptr(), there.numel() * there.element_size())


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file with these tensors."""
    header, parts, at = {}, [], 0
    for name, tensor in tensors.items():
        parts.append(content(tensor))
        end = at + len(parts[-1])
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
