"""What unmodified PyTorch does with the software device by itself: nothing here needs the Python operations layer.

Run with the Python of a software environment: ``python -m pytest crates/sire-sim-cuda/tests``. Every test is a fresh process
(allocator settings and graphs are per process).
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

# PyTorch before 2.10 reads only the older name, and does not say so (pytorch#183387).
ONE_NAME = tuple(int(part) for part in version("torch").split(".")[:2]) < (2, 10)
ALLOC_CONF = "PYTORCH_CUDA_ALLOC_CONF" if ONE_NAME else "PYTORCH_ALLOC_CONF"

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, real or simulated")

PRELUDE = """
import ctypes, torch
def used():
    free, total = torch.cuda.mem_get_info()
    return total - free
torch.empty(1, device="cuda"); torch.cuda.empty_cache(); base = used()
"""


def run(code: str, **variables: str) -> str:
    """Runs `code` in a new interpreter; its assertions are the test."""

    environment = {**os.environ, "SIRE_SIM_MEMORY": "2GiB", "SIRE_SIM_POISON": "sample", **variables}
    script = PRELUDE + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_allocation_is_counted_and_given_back() -> None:
    run("""
        x = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        assert used() - base == 256 << 20
        del x
        torch.cuda.empty_cache()
        assert used() == base
    """)


def test_copies_and_pinned_memory() -> None:
    run("""
        x = torch.arange(1 << 20, dtype=torch.int32).pin_memory()
        assert x.is_pinned()
        y = x.to("cuda", non_blocking=True)
        z = torch.empty_like(x).pin_memory()
        z.copy_(y.clone(), non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(x, z)
        assert torch.full((), 5.0, device="cuda").item() == 5.0
    """)


def test_streams_and_events() -> None:
    run(
        """
        stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record()
            x = torch.zeros(1 << 20, device="cuda")
            end.record()
        torch.cuda.current_stream().wait_event(end)
        end.synchronize()
        assert end.query() and stream.query() and start.elapsed_time(end) > 0
    """,
        SIRE_SIM_DELAY_US="2000",
    )


def test_fills_of_every_type() -> None:
    run("""
        kinds = "uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 bool complex64 complex128 float8_e4m3fn float8_e5m2"
        for kind in map(lambda name: getattr(torch, name), kinds.split()):
            value = 1.5 - 2j if kind.is_complex else 3.0 if kind.is_floating_point else True if kind == torch.bool else 3
            for n in (1, 7, 1000, 100003):
                here = torch.full((n,), value, dtype=kind, device="cuda").cpu().view(torch.uint8)
                assert torch.equal(here, torch.full((n,), value, dtype=kind).view(torch.uint8)), (kind, n)
    """)


def test_out_of_memory_has_pytorchs_words() -> None:
    run("""
        keep = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        try:
            torch.empty(20 << 30, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            assert "Tried to allocate 20.00 GiB" in str(error) and "total capacity of 2.00 GiB" in str(error), error
            assert "this process has 1024.00 MiB memory in use" in str(error), error
        else:
            raise SystemExit("no error")
        assert torch.full((2,), 4, device="cuda").cpu().tolist() == [4, 4]
    """)


def test_mem_pool_and_snapshot() -> None:
    run("""
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            x = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        assert sum(segment["total_size"] for segment in pool.snapshot()) == 64 << 20
        assert len(torch.cuda.memory_snapshot()) >= 1 and used() - base == 64 << 20
        del x, pool
        torch.cuda.empty_cache()
        assert used() == base
    """)


def test_graph_of_copy_and_fill_replays() -> None:
    run("""
        a, b, graph = torch.empty(1000, device="cuda"), torch.empty(1000, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            b.copy_(a)
            c = torch.full((10,), 5.0, device="cuda")
        for value in (2.0, 9.0):
            a.fill_(value)
            graph.replay()
            assert b.cpu().tolist() == [value] * 1000 and c.cpu().tolist() == [5.0] * 10
        graph.reset()
    """)


def test_a_capture_that_synchronises_fails_as_on_a_gpu() -> None:
    run("""
        graph, x = torch.cuda.CUDAGraph(), torch.empty(1000, device="cuda")
        try:
            with torch.cuda.graph(graph):
                torch.cuda.synchronize()
        except RuntimeError as error:
            assert "captur" in str(error), error
        else:
            raise SystemExit("no error")
        assert torch.full((2,), 4, device="cuda").cpu().tolist() == [4, 4]
    """)


def test_expandable_segments() -> None:
    run(
        """
        a, b = (torch.full((100 << 20,), value, dtype=torch.uint8, device="cuda") for value in (7, 8))
        assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot() if segment["total_size"] > 2 << 20)
        address = b.data_ptr()
        del a
        torch.cuda.empty_cache()
        assert used() - base <= 102 << 20 and b.data_ptr() == address and b[-1].item() == 8
        del b
        torch.cuda.empty_cache()
        assert used() <= base
    """,
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
    )


def test_the_asynchronous_allocator() -> None:
    run(
        """
        x = torch.full((10 << 20,), 3, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_allocated() == 10 << 20
        del x
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert used() <= base
    """,
        PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync",
    )


def test_two_devices() -> None:
    run(
        """
        there = torch.arange(10.0).to("cuda:0").to("cuda:1")
        assert there.device.index == 1 and torch.equal(there.cpu(), torch.arange(10.0))
        with torch.cuda.device(1):
            assert torch.zeros(3, device="cuda").device.index == 1
        assert torch.cuda.can_device_access_peer(0, 1)
    """,
        SIRE_SIM_DEVICES="2",
    )


def test_change_current_allocator(tmp_path: Path) -> None:
    source, library = tmp_path / "plug.c", tmp_path / "plug.so"
    source.write_text(
        "#include <sys/types.h>\nextern int cudaMalloc(void **, size_t), cudaFree(void *);\nint live;\n"
        "void *plug_malloc(ssize_t n, int d, void *s) { void *p = 0; if (cudaMalloc(&p, n)) return 0; live++; return p; }\n"
        "void plug_free(void *p, ssize_t n, int d, void *s) { cudaFree(p); live--; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
            import ctypes, torch
            from torch.cuda.memory import CUDAPluggableAllocator, change_current_allocator
            change_current_allocator(CUDAPluggableAllocator({str(library)!r}, "plug_malloc", "plug_free"))
            live = ctypes.c_int.in_dll(ctypes.CDLL({str(library)!r}), "live")
            x = torch.full((64,), 7, device="cuda")
            assert live.value == 1 and x.cpu().tolist() == [7] * 64
            del x
            assert live.value == 0
        """),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


SENDER = """
import ctypes, sys, torch, torch.multiprocessing as mp
def receive(tensors, words):
    tensor = tensors.get(timeout=100)
    words.put(float(tensor.sum()))
    tensor.copy_(torch.full((1000,), 3.0))
    torch.cuda.synchronize()
    words.put("written")
    tensors.get(timeout=100)
if __name__ == "__main__":
    # The receiver looks into this process's descriptors (pidfd_getfd), which some systems allow only so (PR_SET_PTRACER).
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
    context = mp.get_context("spawn")
    tensors, words = context.Queue(), context.Queue()
    process = context.Process(target=receive, args=(tensors, words))
    process.start()
    try:
        whole = torch.arange(300000, device="cuda", dtype=torch.float32)
        tensors.put(whole[1000:2000])
        assert words.get(timeout=100) == sum(range(1000, 2000))
        assert words.get(timeout=100) == "written"
        assert whole[998:1002].tolist() == [998, 999, 3, 3] and whole[1998:2002].tolist() == [3, 3, 2000, 2001]
        tensors.put(None)
        process.join(100)
        assert process.exitcode == 0
    finally:
        process.kill()
"""


@pytest.mark.parametrize("expandable", [False, True])
def test_a_tensor_goes_to_another_process_and_comes_back_changed(tmp_path: Path, expandable: bool) -> None:
    program = tmp_path / "sender.py"
    program.write_text(SENDER)
    settings = {"SIRE_SIM_DIR": str(tmp_path), "SIRE_SIM_MEMORY": "512MiB"}
    environment = os.environ | settings | {ALLOC_CONF: f"expandable_segments:{expandable}"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=250, check=False)
    if "pidfd_getfd" in done.stderr:
        pytest.skip("the system lets no process take another one's descriptors, which PyTorch needs")
    assert done.returncode == 0, done.stdout + done.stderr
