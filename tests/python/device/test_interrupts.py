"""Ctrl-C in the middle of a real pause: it rolls back, and nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import sire
import torch
from measure import MIB, device_used, region_bytes

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
