"""Device memory: results come from PyTorch's allocator and go back to it; unmapped memory gives CUDA's error."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")


def test_everything_is_released_without_the_garbage_collector() -> None:
    """Forward, backward, out=, lists, failures: allocated bytes return to the baseline."""
    model = torch.nn.LSTM(8, 8, num_layers=2).cuda()
    target = torch.empty(0, device="cuda")
    x = torch.randn(6, 2, 8, device="cuda")

    def work() -> None:
        model(x)[0].square().sum().backward()
        model.zero_grad(set_to_none=True)
        torch.mm(x[0].t(), x[0], out=target)
        torch._foreach_add_([x, x], 1.0)
        with pytest.raises(RuntimeError):
            x + torch.ones(3)
        with pytest.raises(RuntimeError):
            x[0] @ x[0]

    work()
    gc.collect()
    gc.disable()
    try:
        baseline = torch.cuda.memory_allocated()
        for _ in range(3):
            work()
        assert torch.cuda.memory_allocated() == baseline
    finally:
        gc.enable()


def test_a_result_dies_with_its_last_reference() -> None:
    """No cycle of this package keeps a tensor."""
    gc.disable()
    try:
        x = torch.ones(4, device="cuda")
        y = x.exp().sort()[0]
        watch = weakref.ref(y.untyped_storage())
        before = torch.cuda.memory_allocated()
        del y
        assert torch.cuda.memory_allocated() < before
        assert watch is not None
    finally:
        gc.enable()


def test_layouts_and_aliases() -> None:
    """Strides, offsets, overlap checks, resized outputs, lazy conjugation."""
    x = torch.arange(24.0, device="cuda").view(2, 3, 4)
    assert x.permute(2, 0, 1).contiguous().stride() == (6, 3, 1)
    assert (x[:, 1:, ::2] + 1).flatten().tolist() == [5, 7, 9, 11, 17, 19, 21, 23]
    x[:, 1:, ::2].add_(100)
    assert x[1, 2].tolist() == [120.0, 21.0, 122.0, 23.0]
    image = torch.randn(2, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last)
    assert torch.nn.Conv2d(3, 3, 3).cuda()(image).is_contiguous(memory_format=torch.channels_last)
    line = torch.arange(5.0, device="cuda")
    with pytest.raises(RuntimeError, match=r"single memory location|overlap"):
        line[1:].add_(line[:-1])
    out = torch.empty(0, device="cuda")
    assert torch.cat([line, line], out=out) is out
    assert out.shape == (10,)
    with pytest.warns(UserWarning, match="resized"):
        torch.add(line, 1, out=torch.empty(2, device="cuda"))
    small = torch.empty(7, device="cuda")
    with pytest.warns(UserWarning, match="resized"):
        torch.add(line, 1, out=small)
    assert small.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    z = torch.tensor([1 + 2j, 3 - 1j], device="cuda")
    assert z.conj().cpu().tolist() == [1 - 2j, 3 + 1j]
    assert (z.conj() @ z).item() == 15
    assert z.imag.sum().item() == 1


def test_operations_wait_for_their_stream() -> None:
    """A result on a side stream, used on another after an event."""
    side = torch.cuda.Stream()
    source = torch.ones(1 << 18).pin_memory()
    with torch.cuda.stream(side):
        x = source.to("cuda", non_blocking=True)
        y = x * 2 + 1
    torch.cuda.current_stream().wait_stream(side)
    assert (y + 1).sum().item() == 4 * (1 << 18)


def test_threads() -> None:
    """Four threads, each with a stream and a model, forward and backward."""
    results: list[Any] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.full((8, 8), float(seed), device="cuda", requires_grad=True)
            for _ in range(20):
                y = (x @ x).tanh().sum()
                (grad,) = torch.autograd.grad(y, x)
                assert grad.shape == (8, 8)
            results.append((x.sum().item(), seed * 64))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    assert all(got == want for got, want in results)


_UNMAPPED = """
import ctypes, torch
torch.cuda.init(); torch.zeros(1, device="cuda")
lib = ctypes.CDLL("libcuda.so.1")
base = ctypes.c_uint64(0)
assert lib.cuMemAddressReserve(ctypes.byref(base), ctypes.c_size_t(2 << 20), ctypes.c_size_t(0), ctypes.c_uint64(0), ctypes.c_uint64(0)) == 0
storage = torch._C._construct_storage_from_data_pointer(base.value, torch.device("cuda:0"), 1024)
x = torch.empty(0, device="cuda").set_(storage, 0, (256,), (1,))
try:
    {touch}
except torch.AcceleratorError as error:
    assert "an illegal memory access was encountered" in str(error), error
    try:
        torch.ones(2, device="cuda") + 1
    except torch.AcceleratorError as again:
        print("sticky")
"""


@pytest.mark.parametrize("touch", ["x.add_(1)", "x[0].item()", "repr(x + 1)", "x.cpu()"])
def test_unmapped_memory_gives_cudas_error(touch: str) -> None:
    """A reserved range without physical memory (a paused tensor's state): error 700, which sticks, instead of a signal."""
    done = subprocess.run([sys.executable, "-c", _UNMAPPED.replace("{touch}", touch)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "sticky"


def test_a_spawned_child_has_the_operations() -> None:
    """The start hook works in every process, and costs a process without torch nothing."""
    code = (
        "import sys, sire_software_device as s; assert 'torch' not in sys.modules; import torch; "
        "assert s.installed(); print((torch.ones(2, device='cuda') + 1).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "4.0", done.stderr[-2000:]
