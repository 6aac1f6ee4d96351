"""Resume in the background: tensors are usable when they are told to be, in the order asked for."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def test_a_module_that_leaves_the_device_is_in_no_order_and_not_waited_for(tag: str) -> None:
    """The program's own forward on the CPU raised that an order takes a CUDA tensor."""
    with sire.region(tag, backup="cpu"):
        model = layers(2, 64)
    order = sire.learn_order(model)
    model[1].cpu()

    def moves(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0].to(module.weight.device)

    data = torch.ones(1, 64, device="cuda")
    with torch.no_grad(), model[1].register_forward_pre_hook(moves, prepend=True):
        model(data)
        assert [address for address, _ in order.ranges] == [model[0].weight.data_ptr(), model[0].bias.data_ptr()]
        assert order.learned
        sire.pause(tag)
        progress = sire.resume(tag, non_blocking=True)
        with progress.guarding(model):
            assert progress.wait()
            model.cpu()
            assert model(data.cpu()).shape == (1, 64)


PATIENCE = 20.0


def streams_of_sire(runtime: Any) -> list[int]:
    """On the software device streams are numbers: those that are not PyTorch's, and do not wait for the default one."""
    newest, flags = ctypes.c_void_p(), ctypes.c_uint()
    assert runtime.cudaStreamCreate(ctypes.byref(newest)) == 0
    others = {torch.cuda.Stream(priority=priority).cuda_stream for priority in (0, -1) for _ in range(33)}
    numbers = [number for number in range(16, newest.value or 0, 16) if number not in others]
    answers = [
        runtime.cudaStreamGetFlags(ctypes.c_void_p(number), ctypes.byref(flags)) or flags.value for number in numbers
    ]
    assert runtime.cudaStreamDestroy(newest) == 0
    runtime.cudaGetLastError()
    return [number for number, answer in zip(numbers, answers, strict=True) if answer == 1]


@contextmanager
def held_copies() -> Iterator[threading.Event]:
    """What Sire copies is queued, and does not begin before the event is set or the block ends."""
    if "software" not in torch.cuda.get_device_name():
        pytest.skip("only the software device can be asked, or made to fail")
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    opened, lapsed = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        if not opened.wait(PATIENCE):
            lapsed.set()

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(hold)
    streams = streams_of_sire(runtime)
    assert streams
    for stream in streams:
        assert runtime.cudaLaunchHostFunc(ctypes.c_void_p(stream), function, None) == 0
    try:
        yield opened
    finally:
        opened.set()
        for stream in streams:
            assert runtime.cudaStreamSynchronize(ctypes.c_void_p(stream)) == 0
    assert not lapsed.is_set(), "somebody waited for what was on its way"


def small(tag: str) -> torch.Tensor:
    """A tensor in a region that is brought back by a single copy, and is paused."""
    with sire.region(tag, backup="cpu"):
        tensor = torch.arange(64 << 10, device="cuda")
    sire.pause(tag)
    return tensor


def test_a_stream_waits_and_its_caller_goes_on(tag: str) -> None:
    tensor = small(tag)
    stream, doubled = torch.cuda.Stream(), []

    def double() -> None:
        # The software device computes in the thread that asks for it, when the stream has come so far.
        with torch.cuda.stream(stream):
            doubled.append(tensor * 2)

    thread = threading.Thread(target=double)
    with held_copies() as opened:
        progress = sire.resume(tag, non_blocking=True)
        assert progress.wait_stream(stream, tensor, timeout=PATIENCE)
        assert not progress.ready(tensor)
        assert not stream.query()
        assert progress.wait_stream(stream, timeout=PATIENCE), "and for the whole resume"
        assert not progress.ready()
        thread.start()
        opened.set()
        thread.join()
        stream.synchronize()
    assert torch.equal(doubled[0].cpu(), torch.arange(64 << 10) * 2)
    assert progress.wait()


def test_an_event_is_recorded_behind_the_bytes(tag: str) -> None:
    tensor = small(tag)
    event = torch.cuda.Event()
    with held_copies() as opened:
        progress = sire.resume(tag, non_blocking=True)
        assert progress.wait_stream(event, tensor, timeout=PATIENCE)
        assert not progress.ready(tensor)
        assert not event.query()
        torch.cuda.current_stream().wait_event(event)
        assert not torch.cuda.current_stream().query()
        opened.set()
        assert int(tensor.sum()) == (64 << 10) * ((64 << 10) - 1) // 2
        assert event.query()
    assert progress.wait()


def test_a_part_that_is_guarded_runs_behind_its_weights(tag: str) -> None:
    with sire.region(tag, backup="cpu"):
        model = torch.nn.Linear(256, 256, device="cuda")
    data = torch.randn(4, 256, device="cuda")
    ready = []
    with torch.no_grad():
        expected = model(data)
        sire.pause(tag)
        with held_copies() as opened:
            progress = sire.resume(tag, non_blocking=True)

            def begins(_module: Any, _inputs: Any) -> None:
                ready.append(progress.ready(model.weight))
                opened.set()

            with progress.guarding(model), model.register_forward_pre_hook(begins):
                assert torch.equal(model(data), expected)
    assert ready == [False], "the part began when its weights were on their way"
    assert progress.wait()


def test_in_a_capture_the_caller_waits(tag: str) -> None:
    tensor = small(tag)
    graph, doubled = torch.cuda.CUDAGraph(), torch.empty(64 << 10, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with held_copies() as opened, torch.cuda.stream(torch.cuda.Stream()):
        progress = sire.resume(tag, non_blocking=True)
        # As torch.cuda.graph does it, which would wait for the device first.
        graph.capture_begin(capture_error_mode="relaxed")
        assert not progress.wait_stream(tensor=tensor, timeout=0.01)
        opened.set()
        assert progress.wait_stream(tensor=tensor, timeout=PATIENCE)
        assert progress.ready(tensor)
        torch.mul(tensor, 2, out=doubled)
        graph.capture_end()
        graph.replay()
        assert torch.equal(doubled.cpu(), torch.arange(64 << 10) * 2)
    assert progress.wait()


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
    assert progress.wait_stream(torch.accelerator.current_stream(), tensor[:0])
    assert progress.wait_stream(torch.Stream("cuda"))


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
