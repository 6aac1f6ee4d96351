"""PyTorch's expandable segments: the same code with the setting on, in both hook modes, under both names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sire
import torch
from measure import ALLOC_CONF, BEFORE_2_11, MIB, command_or_skip, device_used
from torch.multiprocessing import reductions

from conftest import skips

HERE = Path(__file__).resolve().parent


def full(value: int, mebibytes: int) -> torch.Tensor:
    return torch.full((mebibytes * MIB,), value, dtype=torch.uint8, device="cuda")


def are(tensors: list[torch.Tensor]) -> list[int]:
    """The value of each, if it has one throughout."""
    return [int(each[0]) if bool((each == each[0]).all()) else -1 for each in tensors]


@pytest.fixture
def expandable(preloaded: bool, expandable_segments: bool) -> Iterator[bool]:
    """The setting is on; whether regions' memory lies in such segments then."""
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    change("expandable_segments:True")
    try:
        if not preloaded:
            skip_if_pytorch_refuses()
        yield preloaded
    finally:
        change(f"expandable_segments:{expandable_segments}")


def skip_if_pytorch_refuses() -> None:
    """PyTorch before 2.11 has no pool with another allocator beside expandable segments: checked here, and skipped."""
    if BEFORE_2_11 and os.environ.get("SIRE_TEST_MODE") != "allocator":
        with (
            pytest.raises((sire.UnsupportedError, RuntimeError), match="doesn't currently support expandable_segments"),
            sire.region("no"),
        ):
            full(1, 1)
        pytest.skip("PyTorch 2.9: torch.cuda.MemPool doesn't currently support expandable_segments")


def expandable_bytes() -> int:
    """Of regions: PyTorch's own default pool has such segments in any hook mode."""
    regions = [each for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) != (0, 0)]
    return sum(each["total_size"] for each in regions if each["is_expandable"])


def test_grow_pause_free_and_grow_again(tag: str, expandable: bool) -> None:
    before = device_used()
    with sire.region(tag, backup="cpu"):
        tensors = [full(n, 24) for n in range(3)]
        small = [full(n, 1) for n in range(3)]
    assert (expandable_bytes() > 0) == expandable
    placed = [(each, each.data_ptr()) for each in tensors + small]
    for round_ in range(3):
        used = device_used()
        report = sire.pause(tag)
        # Without such segments, what is wholly free in the pool goes back besides.
        assert used - device_used() >= report.bytes_moved == report.bytes_expected
        # The one beside it, of no region, is untouched; what is freed while it is paused is forgotten.
        other = full(77, 48)
        if round_ == 1:
            del tensors[1], small[1]
            placed = [(each, at) for each, at in placed if any(each is kept for kept in tensors + small)]
        torch.cuda.empty_cache()
        assert are([other]) == [77]
        del other
        sire.resume(tag)
        with sire.region(tag, backup="cpu"):
            tensors.append(full(100 + round_, 40))
        placed.append((tensors[-1], tensors[-1].data_ptr()))
        assert all(each.data_ptr() == at for each, at in placed)
    assert are(tensors) == [0, 2, 100, 101, 102]
    assert are(small) == [0, 2]
    sire.pause(tag)
    del placed, tensors, small
    torch.cuda.empty_cache()
    sire.resume(tag)
    assert device_used() >= before


def test_tags_are_paused_one_by_one(tag: str, expandable: bool) -> None:
    tensors = {}
    for name, backup in (("kept", "cpu"), ("dropped", None), ("stored", "disk")):
        with sire.region(f"{tag}/{name}", backup=backup):  # type: ignore[arg-type]
            tensors[name] = [full(n + 1, 5) for n in range(3)]
    used = device_used()
    with sire.paused(f"{tag}/dropped"):
        assert are(tensors["kept"] + tensors["stored"]) == [1, 2, 3] * 2
    with sire.paused(f"{tag}/stored"):
        assert are(tensors["kept"]) == [1, 2, 3]
    report = sire.pause(tag)
    assert report.regions_changed == 3
    assert used - device_used() == report.bytes_moved
    sire.resume(tag)
    assert are(tensors["kept"] + tensors["stored"]) == [1, 2, 3] * 2


def test_out_of_memory_in_growth_and_on_resume(tag: str, expandable: bool) -> None:
    free, _ = torch.cuda.mem_get_info()
    with sire.region(tag, backup="cpu"):
        first = full(1, 100)
        with pytest.raises(torch.OutOfMemoryError):
            full(2, free // MIB)
        second = full(3, 30)
    sire.pause(tag)
    sire.empty_cache()
    thief = full(9, torch.cuda.mem_get_info()[0] // MIB - 60)
    with pytest.raises(sire.OutOfMemoryError):
        sire.resume(tag)
    with pytest.raises(sire.PausedError), sire.region(tag, backup="cpu"):
        pytest.fail("entered")
    del thief
    torch.cuda.empty_cache()
    sire.resume(tag)
    assert are([first, second]) == [1, 3]


def test_training_goes_on_bit_for_bit(tag: str, expandable: bool) -> None:
    def losses(pausing: bool) -> list[float]:
        torch.manual_seed(1)
        with sire.region(f"{tag}/{pausing}", backup="cpu"):
            model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 8)).cuda()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for step in range(6):
            batch = torch.sin(torch.arange(64 * 512).reshape(64, 512) * (step + 1.0)).cuda()
            with sire.region(f"{tag}/{pausing}", backup="cpu"):
                loss = model(batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            found.append(float(loss.detach()))
            if pausing:
                with sire.paused(f"{tag}/{pausing}"):
                    pass
        return found

    assert losses(True) == losses(False)


def test_graphs_replay_after_a_pause_of_their_pool(tag: str, expandable: bool) -> None:
    with sire.region(f"{tag}/weights", backup="cpu"):
        weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).cuda()
    source = torch.ones(64, 512, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with sire.cuda_graph(graph, tag=f"{tag}/graph"):
        hidden = (source @ weight).repeat(64, 8)
        output = torch.relu(hidden).sum(dim=1)
    graph.replay()
    expected = output.clone()
    used = device_used()
    for _ in range(2):
        report = sire.pause(tag)
        assert used - device_used() == report.bytes_moved > 0
        sire.resume(tag)
        output.zero_()
        graph.replay()
        assert torch.equal(output, expected)


@pytest.mark.parametrize("backward", [False, True])
def test_a_pool_outlives_its_tensors(tag: str, expandable: bool, backward: bool) -> None:
    # PyTorch gives free segments of a dropped pool back while others of it live on.
    with sire.region(tag, backup="cpu"):
        tensors = [full(n, 24) for n in range(6)]
    del tensors[::2]
    for _ in range(2):
        sire.pause(tag)
        sire.resume(tag)
    assert are(tensors) == [1, 3, 5]
    tensors.sort(key=lambda each: each.data_ptr(), reverse=backward)
    while tensors:
        tensors.pop()
        torch.cuda.empty_cache()
    with sire.region(tag, backup="cpu"):
        assert are([full(7, 30)]) == [7]


PROGRAM = """
import sire, torch
def full(value):
    return torch.full((12 << 20,), value, dtype=torch.uint8, device='cuda')
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_the_variable_changes_nothing(preloaded: bool) -> None:
    if BEFORE_2_11 and not preloaded:
        pytest.skip("PyTorch 2.9: torch.cuda.MemPool doesn't currently support expandable_segments")
    code = """
outside = full(1)
with sire.region('a', backup='cpu'):
    inside = full(2)
print([each['is_expandable'] for each in torch.cuda.memory_snapshot() if each['total_size'] >= 12 << 20])
free = torch.cuda.mem_get_info()[0]
with sire.paused('a'):
    print((torch.cuda.mem_get_info()[0] - free) >> 20, bool((outside == 1).all()))
print(bool((inside == 2).all()))
"""
    settings = "max_split_size_mb:64,expandable_segments:True"
    segments, paused, resumed = run(code, PYTORCH_CUDA_ALLOC_CONF=settings).splitlines()
    assert segments.count("True") == (2 if preloaded else 1)
    assert int(paused.split()[0]) >= 12
    assert paused.endswith("True")
    assert resumed == "True"


def test_a_whole_process(mode: str) -> None:
    code = """
import threading
tensors = [full(n) for n in range(4)]
worker = threading.Thread(target=lambda: tensors.append(full(4)))
worker.start(); worker.join()
weight = torch.ones(1024, 1024, device='cuda', requires_grad=True)
(weight * 3).sum().backward()
try:
    print(sire.pause().bytes_moved >> 20)
    print(torch.cuda.mem_get_info()[0] == torch.cuda.mem_get_info()[1])
    try:
        # More than is free in the segments: of those PyTorch would hand out what is paused, without a call.
        torch.empty(200 << 20, dtype=torch.uint8, device='cuda')
    except torch.OutOfMemoryError:
        print('refused')
    sire.resume()
    print([int(each[-1]) for each in tensors], float(weight.grad.sum()), int(full(6)[0]))
except sire.UnsupportedError as error:
    print(error)
"""
    settings = {ALLOC_CONF: "expandable_segments:True", "SIRE_REGION": "all", "SIRE_BACKUP": "cpu"}
    said = run(code, **settings).splitlines()
    if mode == "torch":
        assert "only in the hook mode preload" in said[0]
        assert ALLOC_CONF in said[0]
        return
    moved, empty, refused, values = said
    assert int(moved) >= 60
    assert (empty, refused) == ("True", "refused")
    assert values == "[0, 1, 2, 3, 4] 3145728.0 6"


def test_what_a_program_did_with_its_segments_is_replayed(tmp_path: Path, preloaded: bool) -> None:
    """Recorded with the setting on; made again elsewhere, each byte compared after each resume."""
    code = """
with sire.region('a', backup='cpu'):
    tensors = [full(n) for n in range(3)]
with sire.paused('a'):
    outside, _ = full(7), tensors.pop(1)
    torch.cuda.empty_cache()
with sire.region('a', backup='cpu'):
    tensors.append(full(8))
with sire.paused('a'):
    pass
print([int(each[-1]) for each in tensors])
"""
    if BEFORE_2_11 and not preloaded:
        pytest.skip("PyTorch 2.9: torch.cuda.MemPool doesn't currently support expandable_segments")
    command, recorded = command_or_skip(), tmp_path / "recorded.trace"
    settings = {ALLOC_CONF: "expandable_segments:True", "SIRE_TRACE": str(recorded)}
    assert run(code, **settings) == "[0, 2, 8]"
    replay = [command, "replay", recorded, "--device", "software", "--check"]
    done = subprocess.run(
        replay, env=os.environ | {"LD_PRELOAD": ""}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(done.stdout)}
    assert figures["replay.resume"]["samples"] == 2
    assert figures["replay.resume"]["bytes_copied"] >= 2 * 24 * MIB
    assert ("replay.map" in figures) == ("replay.grant" in figures) == preloaded


WHOLE = "PyTorch has one expandable segment for a pool and stream, and gives it back as a whole"
EXPORTED = "PyTorch exports the memory of an expandable segment itself"
KEPT = "keep_resident keeps what is mapped side by side, which is all of an expandable segment"


def test_one_tensor_that_stays_keeps_its_whole_segment(tag: str, expandable: bool) -> None:
    """Tensors know no borders between what is mapped side by side; without such segments a tensor stays by itself."""
    with sire.region(tag, backup="cpu"):
        stays, goes, small = full(1, 48), full(2, 40), full(3, 1)
    kept = sire.keep_resident(stays)
    if expandable:
        [segment] = [each for each in torch.cuda.memory_snapshot() if each["address"] == stays.data_ptr()]
        assert kept == segment["total_size"] >= 88 * MIB
    else:
        assert kept == 48 * MIB
    used = device_used()
    report = sire.pause(tag)
    assert report.bytes_held == kept
    assert used - device_used() == report.bytes_moved >= (1 if expandable else 41) * MIB
    assert are([stays]) == [1]
    if expandable:
        assert are([goes]) == [2], "it is in the same segment"
    sire.resume(tag)
    assert are([stays, goes, small]) == [1, 2, 3]


def test_pytorch_still_exports_expandable_segments(tag: str, expandable: bool) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = full(1, 24)
    if not expandable:
        with pytest.raises(sire.UnsupportedError, match="cannot be sent to another process"):
            reductions.reduce_tensor(tensor)
        return
    rebuild, _arguments = reductions.reduce_tensor(tensor)
    assert rebuild is reductions.rebuild_cuda_tensor
    assert sire.held(tag) != {}, "it stays on the device from now on"


@pytest.mark.usefixtures("expandable")
def test_pytorch_still_gives_the_reason_for_skipping() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        stays, goes = full(1, 48), full(2, 48)
    del goes
    torch.cuda.empty_cache()
    segments = [each for each in pool.snapshot() if each["total_size"] > 0]
    assert [each["total_size"] >= 96 * MIB for each in segments] == [True]
    del stays


def test_every_skipped_test_exists_and_has_a_known_reason() -> None:
    for test, reason in skips("preload-expandable").items():
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (HERE / file).read_text(), flags=re.M), test
        assert reason in (WHOLE, EXPORTED, KEPT)
