"""Ctrl-C in the middle of a real pause: it rolls back, or comes too late. Nothing is lost; owners hear the truth."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sire
import torch
from measure import MIB, device_used, on_software_device, region_bytes
from sire import _library
from sire._adopt import Adopted, adopt
from sire._pieces import Block

SIZE = 384 * MIB


def interrupt_soon(seconds: float) -> threading.Thread:
    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("action", ["pause", "resume"])
def test_ctrl_c_rolls_back(tag: str, action: str) -> None:
    with sire.region(tag, backup="cpu"):
        tensor = torch.full((SIZE,), 11, dtype=torch.uint8, device="cuda")
    resident, region = device_used(), region_bytes(tag)["resident_bytes"]
    if action == "resume":
        sire.pause(tag)
    interrupted = False
    thread = None
    try:
        thread = interrupt_soon(0.02)
        (sire.pause if action == "pause" else sire.resume)(tag)
        thread.join()
        time.sleep(0.05)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if thread is not None:
            thread.join()
    assert interrupted
    # Either it was rolled back, or it had completed before the signal came: never in between.
    paused = sire.region(tag, backup="cpu").paused
    assert device_used() == (resident - region if paused else resident)
    sire.resume(tag)
    assert bool((tensor == 11).all())
    assert device_used() == resident


# --- too late ------------------------------------------------------------------------------------------------------

Late = Callable[[str], None]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    """The library's next call of this name has done its work when Ctrl-C comes, and cannot be cancelled any more."""

    def prepare(name: str) -> None:
        plain = getattr(_library.Library, name)
        heard = threading.Event()
        main = threading.main_thread().ident or 0

        def call(*arguments: Any, **more: Any) -> Any:
            monkeypatch.setattr(_library.Library, name, plain)
            result = plain(*arguments, **more)
            signal.pthread_kill(main, signal.SIGINT)
            assert heard.wait(60), "nobody was interrupted"
            return result

        monkeypatch.setattr(_library.Library, name, call)
        monkeypatch.setattr(_library.Library, "cancel", lambda _library: heard.set())

    return prepare


@pytest.fixture
def told(tag: str) -> Iterator[list[tuple[str, str | None]]]:
    """What owners of memory of the tag are told."""
    said: list[tuple[str, str | None]] = []
    callbacks = [
        sire.before_pause(lambda each: said.append(("before", each)), tag=tag),
        sire.after_resume(lambda each: said.append(("after", each)), tag=tag),
    ]
    yield said
    for callback in callbacks:
        callback.remove()


def make(tag: str, value: int = 11) -> torch.Tensor:
    with sire.region(tag, backup="cpu"):
        return torch.full((MIB,), value, dtype=torch.uint8, device="cuda")


def is_paused(tag: str) -> bool:
    return sire.region(tag, backup="cpu").paused


def test_owners_do_not_take_hold_again_of_what_is_away(
    tag: str, late: Late, told: list[tuple[str, str | None]]
) -> None:
    """They were told that the memory was back, which the interrupted pause had taken."""
    tensor = make(tag)
    late("pause")
    with pytest.raises(KeyboardInterrupt):
        sire.pause(tag)
    assert is_paused(tag)
    assert told == [("before", tag)]
    sire.resume(tag)
    assert told == [("before", tag), ("after", tag)]
    assert bool((tensor == 11).all())


def test_owners_hear_of_a_resume_whose_caller_was_interrupted(
    tag: str, late: Late, told: list[tuple[str, str | None]]
) -> None:
    """Nobody told them: not that call, and not the one that repeated it, which had nothing to do."""
    make(tag)
    sire.pause(tag)
    late("resume")
    with pytest.raises(KeyboardInterrupt):
        sire.resume(tag)
    assert not is_paused(tag)
    assert told == [("before", tag), ("after", tag)]
    sire.resume(tag)
    assert told == [("before", tag), ("after", tag)]


def test_owners_hear_of_both_halves_of_a_switch(tag: str, late: Late, told: list[tuple[str, str | None]]) -> None:
    make(f"{tag}/a")
    make(f"{tag}/b")
    sire.pause(f"{tag}/b")
    late("switch")
    with pytest.raises(KeyboardInterrupt):
        sire.switch(pause=f"{tag}/a", resume=f"{tag}/b")
    assert (is_paused(f"{tag}/a"), is_paused(f"{tag}/b")) == (True, False)
    assert told[1:] == [("before", f"{tag}/a"), ("after", f"{tag}/b")]


def test_what_paused_has_paused_comes_back(tag: str, late: Late, told: list[tuple[str, str | None]]) -> None:
    """The block was never entered, so nobody resumed the tag."""
    tensor = make(tag)
    late("pause")
    with pytest.raises(KeyboardInterrupt), sire.paused(tag):
        pytest.fail("entered")
    assert not is_paused(tag)
    assert told == [("before", tag), ("after", tag)]
    assert bool((tensor == 11).all())


# --- adopted modules -----------------------------------------------------------------------------------------------


class Bytes(torch.nn.Module):
    """So many bytes, a different one in each MiB."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("bytes", torch.arange(size // MIB, dtype=torch.uint8).repeat_interleave(MIB))

    def are(self, added: int) -> bool:
        expected = Bytes(self.bytes.numel()).bytes + added
        return torch.equal(self.bytes.cpu(), expected)


@contextmanager
def adopted(size: int, mode: Any) -> Iterator[tuple[Bytes, Adopted]]:
    """Loaded, and written to on the device."""
    module = Bytes(size)
    made = adopt(module, mode=mode)
    try:
        made.load()
        module.bytes.add_(1)
        yield module, made
    finally:
        made.release()


@pytest.mark.parametrize("mode", ["view", "paused"])
@pytest.mark.parametrize("release", ["eager", "lazy"])
def test_an_offload_that_is_over_all_the_same_loses_no_weights(late: Late, mode: str, release: Any) -> None:
    """Ctrl-C left a module that counted as loaded, and whose bytes were undefined after the next load."""
    with adopted(4 * MIB, mode) as (module, made):
        late("pause")
        with pytest.raises(KeyboardInterrupt):
            made.offload(release)
        assert not made.loaded
        if mode == "view":
            assert not module.bytes.is_cuda
            assert module.are(1)
        made.load()
        assert module.bytes.is_cuda
        assert module.are(1)


def test_memory_that_an_interrupted_load_has_brought_can_be_given_back(late: Late) -> None:
    """It stayed, and counted for nothing, until the next load."""
    with adopted(4 * MIB, "view") as (module, made):
        made.offload()
        before = region_bytes(made.tag)["resident_bytes"]
        late("resume")
        with pytest.raises(KeyboardInterrupt):
            made.load()
        assert made.resident_bytes >= 4 * MIB
        made.offload()
        assert region_bytes(made.tag)["resident_bytes"] == before
        assert module.are(1)
        made.load()
        assert module.are(1)


@pytest.mark.parametrize("is_undone", [True, False])
def test_an_offload_that_fails_when_content_has_gone_loses_no_weights(is_undone: bool) -> None:
    """Views are named as dead to the library, so that its undo brings back memory without their bytes."""
    if not on_software_device():
        pytest.skip("only the software device can be asked, or made to fail")
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    faults = b"cuMemUnmap#2=error:999" if is_undone else b"cuMemUnmap#2=error:999; cuMemCreate=error:2"
    with adopted(96 * MIB, "view") as (module, made):
        # What others have freed goes now, and no longer within the pause that is to fail.
        gc.collect()
        made.offload()
        made.load()
        assert runtime.sire_sim_fault(faults) == 0
        try:
            with pytest.raises(sire.DriverError if is_undone else sire.PausedAfterFailureError):
                made.offload()
        finally:
            runtime.sire_sim_fault(b"")
        assert made.loaded == module.bytes.is_cuda == is_undone
        assert module.are(1)
        made.load()
        assert module.are(1)
        module.bytes.add_(1)
        made.offload()
        assert module.are(2)


def test_an_offload_whose_undo_fails_too_leaves_the_module_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise sire.BusyError("on purpose")

    def fail(*_: Any, **__: Any) -> None:
        raise sire.DriverError("on purpose, too")

    with adopted(4 * MIB, "view") as (module, made):
        with monkeypatch.context() as broken, pytest.raises(sire.BusyError):
            broken.setattr(_library.Library, "pause", refuse)
            broken.setattr(Block, "fill", fail)
            made.offload()
        assert not made.loaded
        assert not module.bytes.is_cuda
        assert module.are(1)
        assert made.resident_bytes >= 4 * MIB
        made.offload()
        assert made.resident_bytes == 0
        made.load()
        assert module.are(1)
