"""Resume in the background: tensors are usable when they are told to be, in the order asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import sire
import torch
from measure import MIB, device_used, region_bytes


def layers(count: int = 6, width: int = 2048) -> torch.nn.Sequential:
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count))).cuda()


def test_tensors_become_ready_and_hold_their_bytes(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensors = [torch.full((32 * MIB,), n, dtype=torch.uint8, device="cuda") for n in range(6)]
    address = tensors[0].data_ptr()
    resident = device_used()
    sire.pause(tag)
    progress = sire.resume(tag, non_blocking=True, order=list(reversed(tensors)))
    for n in reversed(range(6)):
        assert progress.wait(tensors[n])
        assert progress.ready(tensors[n])
        assert bool((tensors[n] == n).all())
    assert progress.wait()
    report = progress.report()
    assert report is not None
    assert report.bytes_copied == 6 * 32 * MIB
    assert progress.bytes_ready == progress.bytes_total == region_bytes(tag)["resident_bytes"]
    assert device_used() == resident
    assert tensors[0].data_ptr() == address
    assert progress.ready(torch.ones(4, device="cuda"))


def test_a_forward_begins_before_the_last_layer_is_there(tag: str) -> None:
    torch.manual_seed(0)
    with sire.region(tag, backup="cpu"):
        model = layers()
    data = torch.randn(4, 2048, device="cuda")
    order = sire.learn_order(model)
    assert not order.learned
    with torch.no_grad():
        expected = model(data)
    assert order.learned
    first = model[0].weight
    assert order.ranges[0] == (first.data_ptr(), first.numel() * 4)
    assert len(order.ranges) == 12
    assert all(not part._forward_pre_hooks for part in model)
    for _ in range(2):
        sire.pause(tag)
        progress = sire.prefetch(tag, order=order)
        with progress.guarding(model), torch.no_grad():
            assert torch.equal(model(data), expected)
        progress.wait()
        assert all(not part._forward_pre_hooks for part in model)
    sire.pause(tag)
    assert sire.resume(tag, order=model).changed


def test_streams_and_events_can_be_named(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = torch.arange(MIB, device="cuda")
    expected = tensor.cpu()
    sire.pause(tag)
    progress = sire.resume(tag, non_blocking=True)
    stream = torch.cuda.Stream()
    assert progress.wait_stream(stream, tensor)
    with torch.cuda.stream(stream):
        copy = tensor + 0
    stream.synchronize()
    assert torch.equal(copy.cpu(), expected)
    assert progress.wait_stream(torch.cuda.Event())


def test_a_shortage_is_told_when_somebody_waits(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = torch.full((256 * MIB,), 7, dtype=torch.uint8, device="cuda")
    sire.pause(tag)
    free, _ = torch.cuda.mem_get_info()
    thief = torch.empty(free - 64 * MIB, dtype=torch.uint8, device="cuda")
    progress = sire.prefetch(tag)
    with pytest.raises(torch.OutOfMemoryError):
        progress.wait(tensor)
    assert not progress.ready(tensor)
    assert sire.region(tag, backup="cpu").paused
    del thief
    torch.cuda.empty_cache()
    assert sire.prefetch(tag).wait(tensor)
    assert bool((tensor == 7).all())
    sire.resume(tag, wait=10)


def test_a_region_can_be_entered_once_it_is_back(tag: str) -> None:
    with sire.region(tag, backup="cpu", on_paused="resume"):
        tensor = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    sire.pause(tag)
    sire.prefetch(tag)
    with sire.region(tag, backup="cpu", on_paused="resume"):
        assert bool((tensor == 1).all())


def test_the_process_may_end_meanwhile(mode: str) -> None:
    program = """
        import sire, torch
        with sire.region("a", backup="cpu"):
            tensors = [torch.ones(64 << 20, dtype=torch.uint8, device="cuda") for _ in range(8)]
        sire.pause("a")
        progress = sire.resume("a", non_blocking=True)
        print("over", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
