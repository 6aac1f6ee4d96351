"""The library as PyTorch's only CUDA allocator, by `sire.use_allocator` and by PyTorch's own words."""

from __future__ import annotations

import subprocess
import sys

COMMON = """
import sire, torch
from sire import _library
def full(value, size=1 << 22):
    return torch.full((size,), value, dtype=torch.uint8, device='cuda')
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", COMMON + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_use_allocator_with_regions() -> None:
    code = """
sire.use_allocator()
with sire.region('kept', backup='cpu'):
    kept = full(5)
    small = [torch.full((50,), n, device='cuda') for n in range(20)]
other = full(6)
address = kept.data_ptr()
report = sire.pause('kept')
assert report.bytes_copied >= 1 << 22 and bool((other == 6).all())
sire.resume('kept')
assert kept.data_ptr() == address and bool((kept == 5).all())
assert all(bool((each == n).all()) for n, each in enumerate(small))
try:
    full(1, 1 << 45)
except torch.OutOfMemoryError:
    print('out of memory')
print(bool(full(7).all()))
try:
    with sire.cuda_graph(torch.cuda.CUDAGraph()): pass
except sire.UnsupportedError as error:
    print(error)
"""
    lines = run(code).splitlines()
    assert lines[:2] == ["out of memory", "True"]
    assert "whole-process pluggable allocator has none" in lines[2]


def test_pytorchs_own_words() -> None:
    code = """
from torch.cuda.memory import CUDAPluggableAllocator
path = str(sire.library_path())
torch.cuda.memory.change_current_allocator(CUDAPluggableAllocator(path, "sire_torch_malloc", "sire_torch_free"))
tensor = full(3)
assert _library.load().owns(tensor.data_ptr())
report = sire.pause()
assert report.bytes_moved >= 1 << 22 and report.bytes_discarded > 0
sire.resume()
tensor.fill_(4)
print(bool((tensor == 4).all()))
"""
    assert run(code) == "True"


def test_it_comes_too_late_once_cuda_is_used() -> None:
    code = """
full(1)
try:
    sire.use_allocator()
except sire.UnsupportedError as error:
    print(error)
"""
    assert "before anything uses CUDA" in run(code)
