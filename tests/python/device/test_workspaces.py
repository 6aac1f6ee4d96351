"""What PyTorch takes once and keeps for the process is in no region: cuBLAS's workspaces, generators' tensors.

Each program runs in a process of its own, in which nothing was taken before. The software device has handles of cuBLAS
and no products; PyTorch allocates the workspace where it gets the handle.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure import MIB, on_software_device
from sire._packed import HostBlock, host_bytes

COMMON = """
import sire, torch
from measure import MIB, device_used, region_bytes
from sire import _library

def resident(*tags):
    return sum(region_bytes(tag)["resident_bytes"] for tag in tags)
"""

REGION = """
with sire.region("first"):
    weight = torch.ones(16, device="cuda")
before = device_used()
with sire.region("weights"):
    weight = torch.ones(16, device="cuda")
    with sire.region("weights/inner"):
        inner = torch.ones(16, device="cuda")
        torch.cuda.current_blas_handle()
print(device_used() >= 8 * MIB, resident("first", "weights", "weights/inner") <= 6 * MIB)
torch._C._cuda_clearCublasWorkspaces()
with sire.region("weights"):
    torch.cuda.current_blas_handle()
print(device_used() >= 8 * MIB, resident("first", "weights", "weights/inner") <= 6 * MIB)
"""

GRAPHS = """
source = torch.ones(16, device="cuda")
graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
for number, graph in enumerate(graphs):
    with sire.cuda_graph(graph, tag=f"graph{number}"):
        torch.cuda.current_blas_handle()
        output = source + 1
print(device_used() >= 8 * MIB, resident("graph0", "graph1") <= 4 * MIB)
sire.pause("graph0")
graphs[1].replay()
print(float(output[0]) == 2, True)
"""

GENERATOR = """
source = torch.ones(4 << 20, device="cuda")
graph = torch.cuda.CUDAGraph()
with sire.cuda_graph(graph, tag="graph"):
    output = torch.nn.functional.dropout(source)
segments = [each for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) == (0, 0)]
owned = [each for each in segments if _library.load().owns(each["address"])]
print(bool(segments), not owned)
print(resident("graph") >= 16 * MIB, True)
with sire.region("outer"):
    inner = torch.cuda.CUDAGraph()
    with sire.cuda_graph(inner, tag="nested"):
        again = torch.nn.functional.dropout(source)
print(resident("outer") == 0, resident("nested") >= 16 * MIB)
sire.pause("outer")
sire.pause("graph")
inner.replay()
print(bool(((again == 0) | (again == 2)).all()), True)
"""

INFERENCE = """
source = torch.ones(64, device="cuda")
first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
with torch.inference_mode(), sire.cuda_graph(first, tag="first"):
    torch.nn.functional.dropout(source)
with sire.cuda_graph(second, tag="second"):
    output = torch.nn.functional.dropout(source)
first.replay()
second.replay()
print(bool(((output == 0) | (output == 2)).all()), True)
"""

UNSEEN = """
import ctypes, threading, types
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from sire import _torch, _workspaces

def exchanged(mode):
    mode = ctypes.c_int(mode)
    assert _torch.runtime(torch).cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
    return mode.value

handle, calls, seen, is_short = torch.cuda.current_blas_handle, [], [], False

def counted():
    mode = exchanged(2)
    exchanged(mode)
    calls.append((mode, threading.current_thread() is threading.main_thread()))
    if is_short:
        raise RuntimeError("no room")
    return handle()

def noted(what):
    seen.append(getattr(what, "__name__", str(type(what))))
    return what

class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return noted(function)(*args, **(kwargs or {}))

class Called(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return noted(function)(*args, **(kwargs or {}))

torch._C._cuda_clearCublasWorkspaces()
torch.cuda.current_blas_handle = counted

def watched():
    seen.clear()
    with torch.autograd.graph.saved_tensors_hooks(noted, noted), Dispatched(), Called():
        with torch.inference_mode(), sire.region("first"):
            pass
        with sire.cuda_graph(torch.cuda.CUDAGraph(), tag="graph"):
            pass
    return list(seen)

# The second time nothing is made any more: what is seen is what PyTorch does for a capture itself.
print(watched() == watched() and not any("empty" in each for each in seen), exchanged(0) == 0)
print(set(calls) == {(2, True), (2, False)}, True)

def inside(value):
    with sire.region("first"):
        return value * 2

calls.clear()
torch._C._cuda_clearCublasWorkspaces()
torch.func.vmap(torch.func.grad(inside))(torch.ones(3))
print(calls == [(2, True)], True)

def enters():
    calls.clear()
    for _ in range(3):
        with sire.region("first"):
            pass
    return len(calls)

now = 0.0
_workspaces.time = types.SimpleNamespace(monotonic=lambda: now)
torch._C._cuda_clearCublasWorkspaces()
is_short = True
tries = [enters(), enters()]
now = 60.0
tries.append(enters())
is_short = False
tries.append(enters())
now = 120.0
print(tries == [1, 0, 1, 0], [enters(), enters()] == [1, 0])
"""

OTHER_DEVICE = """
torch.cuda.set_device(1)
stream = torch.cuda.Stream()
torch.cuda.set_device(0)
with sire.region("outer", device=1), torch.cuda.stream(stream), torch.cuda.device(0):
    with sire.region("inner", device=1), torch.cuda.device(1):
        handle()
print(resident("outer", "inner") == 0, True)
"""

NEAR_THE_LIMIT = """
most = torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
del most
graph = torch.cuda.CUDAGraph()
with sire.cuda_graph(graph, tag="graph"):
    output = torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
    output[-16:].fill_(3)
graph.replay()
print(int(output[-1]) == 3, resident("graph") >= 300 * MIB)
print(True, True)
"""


def run(program: str, **more: str) -> str:
    variables = os.environ | {"TORCH_CUBLAS_WORKSPACE_CACHE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    variables |= {"SIRE_SIM_MEMORY": "512MiB"} | more
    variables["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", COMMON + program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    # PyTorch warns where a thread begins with a product.
    assert "no current CUDA context" not in done.stderr
    return done.stdout


TURNS = """
with sire.region("weights"):
    weight = torch.ones(16, device="cuda")
del weight
# What was made for the region stays, outside; that is not the program's, so it may take turns.
with sire.time_slice(group="beside workspaces") as turns:
    print(device_used() >= 8 * MIB, turns.figures["state"] == "resident")
kept = torch.ones(16, device="cuda")
try:
    sire.time_slice().__enter__()
except sire.UnsupportedError as error:
    print("bytes of tensors were on the device" in str(error), True)
"""


def test_turns_are_taken_beside_workspaces(preloaded: bool, tmp_path: Path) -> None:
    """It was refused once: Sire's own had been on the device before."""
    if not preloaded:
        pytest.skip("time slices need a hook mode in which everything is heard")
    assert run(TURNS, TORCHTOOLS_LOCK_DIR=str(tmp_path)) == "True True\n" * 2


def test_modes_that_nobody_else_has_outlive_the_workspaces() -> None:
    """PyTorch 2.9 freed them when they were put aside, as that of SIRE_CHECK."""
    assert run(REGION, SIRE_CHECK="1") == "True True\n" * 2


def test_workspaces_are_outside() -> None:
    assert run(REGION + GRAPHS) == "True True\n" * 4


def test_generators_tensors_are_outside(mode: str) -> None:
    if mode == "allocator":
        pytest.skip("there, all of PyTorch's memory is in regions")
    assert run(GENERATOR) == "True True\n" * 4


def test_what_is_made_beforehand_is_none_of_the_programs(mode: str) -> None:
    """Neither seen by its modes and hooks, nor made in inference mode, nor tried at each region; no capture minds."""
    if mode != "torch":
        pytest.skip("the process is the same in every mode")
    if not on_software_device():
        pytest.skip("there may be one device only")
    assert run(INFERENCE + UNSEEN + OTHER_DEVICE, SIRE_SIM_DEVICES="2") == "True True\n" * 6


def test_what_pytorch_frees_before_a_capture_is_there_for_it(mode: str) -> None:
    """Also where it is the library's: all memory is, in hook mode allocator and in a process-wide region."""
    assert run(NEAR_THE_LIMIT, **({"SIRE_REGION": "all"} if mode == "preload" else {})) == "True True\n" * 2


def test_a_refused_registration_leaves_no_error_for_the_next_kernel() -> None:
    if not on_software_device():
        pytest.skip("only the software device can be asked, or made to fail")
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    torch.cuda.init()
    block = HostBlock(2 * MIB)
    assert runtime.sire_sim_fault(b"cudaHostRegister=error:2") == 0
    try:
        assert int(torch.cuda.cudart().cudaHostRegister(host_bytes(torch, block.piece(0, 16)).data_ptr(), 16, 0)) == 2
        assert runtime.cudaGetLastError() == 2, "it would be there"
        block.register(torch)
        assert runtime.cudaGetLastError() == 0
    finally:
        runtime.sire_sim_fault(b"")
