"""CUDA graphs: replay after pause and resume of what they read, and of their own memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import sire
import torch
from measure import MIB, device_used, region_bytes
from sire import _library, _torch

WIDTH = 1024


class Decoder:
    """Weights, a cache, and a graph of one step with intermediates of its own."""

    def __init__(self, tag: str) -> None:
        torch.manual_seed(0)
        with sire.region(f"{tag}/weights", backup="cpu"):
            self.weight = torch.randn(WIDTH, WIDTH).cuda()
        with sire.region(f"{tag}/cache"):
            self.cache = torch.zeros(WIDTH, WIDTH, device="cuda")
        self.input = torch.zeros(64, WIDTH, device="cuda")
        self.step()
        self.graph = torch.cuda.CUDAGraph()
        with sire.cuda_graph(self.graph, tag=f"{tag}/graph"):
            self.output = self.step()

    def step(self) -> torch.Tensor:
        hidden = torch.relu(self.input @ self.weight)
        self.cache[:64].add_(hidden)
        big = hidden.repeat(64, 1)
        return (big + 1).sum(dim=0, keepdim=True) + self.cache[:1]

    def run(self, value: float) -> torch.Tensor:
        self.cache.zero_()
        self.input.fill_(value)
        self.graph.replay()
        return self.output.clone()


def test_replay_after_pause_of_weights_cache_and_private_pool(tag: str) -> None:
    decoder = Decoder(tag)
    expected = [decoder.run(value) for value in (1.0, 2.0)]
    with torch.no_grad():
        decoder.cache.zero_()
        assert torch.equal(decoder.step(), expected[1])
    assert _library.load().owns(decoder.output.data_ptr())
    assert region_bytes(f"{tag}/graph")["resident_bytes"] >= 16 * MIB
    resident = device_used()
    addresses = (decoder.weight.data_ptr(), decoder.cache.data_ptr(), decoder.output.data_ptr())
    for _ in range(3):
        report = sire.pause(tag)
        assert report.regions_changed == 3
        assert resident - device_used() == report.bytes_moved >= 24 * MIB
        sire.resume(tag)
        assert (decoder.weight.data_ptr(), decoder.cache.data_ptr(), decoder.output.data_ptr()) == addresses
        assert [bool(torch.equal(decoder.run(v), e)) for v, e in zip((1.0, 2.0), expected, strict=True)] == [True, True]


def test_only_the_graphs_memory(tag: str) -> None:
    decoder = Decoder(tag)
    expected = decoder.run(1.0)
    with sire.paused(f"{tag}/graph"):
        taken = torch.full((16 * MIB,), 255, dtype=torch.uint8, device="cuda")
    assert torch.equal(decoder.run(1.0), expected)
    del taken


def test_a_graphs_outputs_survive_with_a_backup(tag: str) -> None:
    source = torch.ones(MIB, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with sire.cuda_graph(graph, tag=tag, backup="cpu"):
        output = source * 3
    graph.replay()
    with sire.paused(tag):
        pass
    assert bool((output == 3).all())


def test_pausing_during_capture_is_refused(tag: str) -> None:
    with sire.region(f"{tag}/other"):
        torch.ones(MIB, device="cuda")
    source = torch.ones(MIB, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with sire.cuda_graph(graph, tag=tag):
        output = source + 1
        for call in (sire.pause, sire.resume):
            with pytest.raises(sire.CapturingError):
                call(f"{tag}/other")
    graph.replay()
    assert bool((output == 2).all())
    assert sire.pause(f"{tag}/other").changed


def test_graphs_with_one_handle_share_a_pool(tag: str, mode: str) -> None:
    handle = torch.cuda.graph_pool_handle()
    source = torch.ones(4 * MIB, device="cuda")
    graphs, outputs = [], []
    for factor in (2, 3):
        graph = torch.cuda.CUDAGraph()
        with sire.cuda_graph(graph, tag=tag, pool=handle):
            outputs.append((source * factor) + 1)
        graphs.append(graph)
    assert graphs[0].pool() == graphs[1].pool()
    third = torch.cuda.CUDAGraph()
    with sire.cuda_graph(third, tag=tag, pool=graphs[0].pool()):
        source + 3
    assert third.pool() == graphs[0].pool()
    # The library keeps what is captured apart by PyTorch's own handle; a pool of PyTorch's would lead past it.
    assert (graphs[0].pool() == handle) == (mode == "allocator")
    with sire.paused(tag):
        pass
    for graph in graphs:
        graph.replay()
    assert [float(each[0]) for each in outputs] == [3.0, 4.0]
    again = torch.cuda.CUDAGraph()
    own = torch.cuda.CUDAGraph()
    with sire.cuda_graph(own, tag=tag):
        source + 1
    with sire.cuda_graph(again, tag=tag, pool=own.pool()):
        source + 2
    assert again.pool() == own.pool()
    if mode == "allocator":
        return
    with (
        pytest.raises(sire.InvalidArgumentError, match="one pool cannot serve"),
        sire.cuda_graph(torch.cuda.CUDAGraph(), tag=f"{tag}/other", pool=own.pool()),
    ):
        pytest.fail("captured")


def test_a_failed_capture_leaves_everything_usable(tag: str) -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ZeroDivisionError), sire.cuda_graph(graph, tag=tag):
        torch.ones(MIB, device="cuda")
        raise ZeroDivisionError
    with sire.region(f"{tag}/after", backup="cpu"):
        tensor = torch.ones(MIB, device="cuda")
    with sire.paused(f"{tag}/after"):
        pass
    assert bool((tensor == 1).all())


def test_a_graph_captured_inside_a_region(tag: str) -> None:
    graph = torch.cuda.CUDAGraph()
    source = torch.ones(MIB, device="cuda")
    with sire.region(f"{tag}/region"):
        kept = torch.ones(MIB, device="cuda")
        with sire.cuda_graph(graph, tag=f"{tag}/graph"):
            output = source * 5
    library = _library.load()
    assert library.allocation(output.data_ptr()).region != library.allocation(kept.data_ptr()).region
    with sire.paused(f"{tag}/graph"):
        assert bool((kept == 1).all())
    graph.replay()
    assert bool((output == 5).all())


def test_a_replay_while_the_graphs_memory_is_paused_is_refused(tag: str) -> None:
    decoder = Decoder(tag)
    expected = decoder.run(1.0)
    with sire.paused(f"{tag}/graph"), pytest.raises(sire.PausedError, match=f"region '{tag}/graph', which is paused"):
        decoder.graph.replay()
    assert torch.equal(decoder.run(1.0), expected), "the context lives"


@pytest.mark.parametrize("checked", [True, False])
def test_a_replay_while_what_it_reads_is_paused_is_refused(tag: str, checked: bool) -> None:
    with sire.region(f"{tag}/weights", backup="cpu"):
        weight = torch.full((MIB,), 2.0, device="cuda")
    with sire.region(f"{tag}/other"):
        other = torch.ones(MIB, device="cuda")
    graph = torch.cuda.CUDAGraph()
    named = () if checked else (f"{tag}/weights",)
    with sire.checked() if checked else nullcontext(), sire.cuda_graph(graph, tag=f"{tag}/graph", uses=named):
        output = weight * 3
    with sire.paused(f"{tag}/weights"), pytest.raises(sire.PausedError, match=f"region '{tag}/weights'"):
        graph.replay()
    with sire.paused(f"{tag}/other"):
        graph.replay()
        assert bool((output == 6).all())
    if checked:
        sire.keep_resident(weight)
        with sire.paused(f"{tag}/weights"):
            graph.replay()
    assert other.shape == (MIB,)


def test_a_capture_that_nobody_told_of_refuses_a_pause_by_name(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = torch.ones(MIB, device="cuda")
    refused: list[str] = []

    def pause() -> None:
        try:
            sire.pause(tag)
        except sire.CapturingError as error:
            refused.append(str(error))

    # The driver may void the capture for that, and says so at its end.
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="global"):
        torch.ones(4, device="cuda").add_(1)
        thread = threading.Thread(target=pause)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "end the capture first" in refused[0]
    with sire.paused(tag):
        pass
    assert bool((tensor == 1).all())


def test_a_region_that_begins_inside_a_capture_holds_its_tensors_or_refuses(tag: str, mode: str) -> None:
    graph = torch.cuda.CUDAGraph()
    source = torch.ones(MIB, device="cuda")
    if torch.__version__ < (2, 11) and mode != "allocator":
        with torch.cuda.graph(graph):
            with pytest.raises(sire.UnsupportedError, match="takes all memory of a graph capture"), sire.region(tag):
                pytest.fail("entered")
            with pytest.raises(sire.UnsupportedError, match="Capture the whole graph"), sire.disable():
                pytest.fail("entered")
            output = source * 2
    else:
        with torch.cuda.graph(graph), sire.region(tag):
            output = source * 2
        assert _library.load().owns(output.data_ptr())
        assert region_bytes(tag)["resident_bytes"] >= 4 * MIB
    graph.replay()
    assert bool((output == 2).all())


def test_the_innermost_pool_serves_also_the_programs_own(tag: str) -> None:
    library = _library.load()
    # To drop a pool while another is current would end the process.
    own, other, graph = torch.cuda.MemPool(), torch.cuda.MemPool(), torch.cuda.CUDAGraph()
    with torch.cuda.use_mem_pool(own):
        first = torch.ones(MIB, device="cuda")
        with sire.region(tag):
            inner = torch.ones(MIB, device="cuda")
            with torch.cuda.use_mem_pool(other):
                innermost = torch.ones(MIB, device="cuda")
            with torch.cuda.graph(graph):
                captured = inner * 3
            again = torch.ones(MIB, device="cuda")
        last = torch.ones(MIB, device="cuda")
    assert library.owns(inner.data_ptr())
    assert library.owns(again.data_ptr())
    owned = [each["address"] for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) == own.id]
    sizes = {each["address"]: each["total_size"] for each in torch.cuda.memory_snapshot()}

    def in_own(tensor: torch.Tensor) -> bool:
        return any(address <= tensor.data_ptr() < address + sizes[address] for address in owned)

    found = [in_own(each) for each in (first, inner, innermost, captured, again, last)]
    assert found == [True, False, False, False, False, True]
    graph.replay()
    with sire.paused(tag):
        pass
    assert bool((first == 1).all())
    del first, last, innermost


@pytest.mark.parametrize("named", [False, True])
def test_graphs_that_go_give_their_memory_back(tag: str, named: bool) -> None:
    """Pools that were shared by a handle of the program's stayed for ever."""
    source = torch.ones(4 * MIB, device="cuda")
    before = None
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with sire.cuda_graph(graph, tag=tag, pool=torch.cuda.graph_pool_handle() if named else None):
            output = source + 1
        graph.replay()
        assert float(output[-1]) == 2.0
        del graph, output
        # Pools of graphs that are gone go with the next region that ends.
        with sire.region(f"{tag}/next"):
            pass
        used = device_used()
        before = before or used
        assert used == before


def test_who_holds_replay_holds_the_graph(tag: str) -> None:
    """Only a weak reference was held: the replay called nobody's method."""
    source = torch.ones(MIB, device="cuda")

    def build() -> tuple[Callable[[], None], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with sire.cuda_graph(graph, tag=tag, backup="cpu"):
            output = source + 1
        return graph.replay, output

    replay, output = build()
    gc.collect()
    replay()
    assert bool((output == 2).all())
    with sire.paused(tag), pytest.raises(sire.PausedError):
        replay()
    plain = torch.cuda.CUDAGraph()
    with torch.cuda.graph(plain):
        other = source + 2
    plain.replay()
    assert bool((other == 3).all()), "a graph of which Sire knows nothing"


def test_a_graph_that_is_reset_leaves_its_memory_and_is_asked_for_it_no_more(tag: str) -> None:
    """The memory stayed until the graph itself went, and what it is captured for next was asked for the old region."""
    source = torch.ones(4 * MIB, device="cuda")
    with sire.region(tag):
        kept = torch.ones(MIB, device="cuda")
    before = region_bytes(tag)["resident_bytes"]
    graph = torch.cuda.CUDAGraph()
    with sire.cuda_graph(graph, tag=tag):
        output = source + 1
    del output
    assert region_bytes(tag)["resident_bytes"] >= before + 16 * MIB
    graph.reset()
    torch.cuda.empty_cache()
    # Older PyTorch drops pools when the next region ends.
    with sire.region(f"{tag}/next"):
        pass
    assert region_bytes(tag)["resident_bytes"] == before
    with torch.cuda.graph(graph):
        output = source + 2
    with sire.paused(tag):
        graph.replay()
        assert bool((output == 3).all())
    graph.reset()
    with sire.cuda_graph(graph, tag=tag):
        output = source + 3
    with sire.paused(tag), pytest.raises(sire.PausedError):
        graph.replay()
    graph.replay()
    assert bool((output == 4).all())
    assert kept.shape == (MIB,)


def test_a_graph_whose_capture_failed_can_be_reset(tag: str) -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ZeroDivisionError), sire.cuda_graph(graph, tag=tag):
        torch.ones(MIB, device="cuda")
        raise ZeroDivisionError
    graph.reset()
    assert "sire_pool" not in vars(graph)


RESET = """
import sire, torch
source = torch.ones(1 << 20, device="cuda")
graph = torch.cuda.CUDAGraph()
with sire.cuda_graph(graph, tag="graph"):
    output = source + 1
del output
graph.reset()
with sire.region("w"):
    del graph
    kept = torch.ones(1 << 20, device="cuda")
with sire.region("w"):
    print(float(kept[-1]))
"""


def test_a_graph_that_was_reset_goes_inside_a_region() -> None:
    """Before PyTorch 2.15 that ended the process: nothing but the graph held its pool any more."""
    command = [sys.executable, "-c", RESET]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == "1.0", done.stderr


UNGUARDED = """
import sire, torch
with sire.region("weights", backup=None if dummy else "cpu"):
    weights = torch.ones(1 << 20, device="cuda")
output = torch.zeros(1 << 20, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    output.copy_(weights)
    weights.fill_(3)
sire.pause("weights")
try:
    graph.replay()
    torch.cuda.synchronize()
    sire.resume("weights")
    print(sire.stats()["dummies"]["strays"])
except RuntimeError as error:
    print("illegal memory access" in str(error))
"""


@pytest.mark.parametrize("dummy", [False, True])
def test_a_replay_that_nobody_guards_is_noticed(dummy: bool) -> None:
    # PyTorch's own way to capture, of which Sire hears nothing: an error of the device's, or a stray that is counted.
    variables = os.environ | {"SIRE_DUMMY": str(int(dummy))}
    command = [sys.executable, "-c", f"dummy = {dummy}\n{UNGUARDED}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == ("1" if dummy else "True"), done.stderr


def test_a_pool_that_goes_while_the_program_has_another_one_current(tag: str) -> None:
    """Before PyTorch 2.15 that would end the process: it goes later."""
    pool = torch.cuda.MemPool()
    with sire.region(tag):
        first = torch.ones(MIB, device="cuda")
    begun, may_end, failed = threading.Event(), threading.Event(), list[BaseException]()

    def use_a_pool() -> None:
        try:
            with torch.cuda.use_mem_pool(pool):
                begun.set()
                may_end.wait(120)
        except BaseException as error:
            failed.append(error)
            begun.set()

    other = threading.Thread(target=use_a_pool)
    other.start()
    assert begun.wait(120)
    try:
        with _torch.unrouted(torch):
            second = torch.ones(MIB, device="cuda")
        del second
    finally:
        may_end.set()
        other.join(120)
    assert not failed
    with sire.region(tag):
        third = torch.ones(MIB, device="cuda")
    assert bool((first + third == 2).all())
