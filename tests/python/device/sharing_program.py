"""Two processes with PyTorch and Sire, and a tensor between them. ``argv``: plain, region or refused."""

from __future__ import annotations

import ctypes
import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any

import sire
import torch
import torch.multiprocessing as mp

PATIENCE = 100
"""Seconds until somebody who does not answer is given up."""


def receive(tensors: Any, words: Any) -> None:
    """The other process: reads, has a region of its own paused meanwhile, writes, lets go."""
    with sire.region("mine", backup="cpu"):
        own = torch.ones(1 << 20, device="cuda")
        tensor = tensors.get(timeout=PATIENCE)
    words.put(float(tensor.sum()))
    with sire.paused():
        tensor.add_(1)
        torch.cuda.synchronize()
        words.put((float(tensor.sum()), sire.held()))
    tensors.get(timeout=PATIENCE)
    words.put(bool((own == 1).all()))
    del tensor


def used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def make(case: str) -> torch.Tensor:
    if case == "plain":
        return torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    with sire.region("sent", backup="cpu"):
        return torch.arange(1 << 20, device="cuda", dtype=torch.float32)


def refused(tensor: torch.Tensor) -> None:
    try:
        ForkingPickler.dumps(tensor)
    except sire.UnsupportedError as error:
        print("refused:", error)


def main(case: str) -> None:
    # Children look into their parent's descriptors (pidfd_getfd), which some systems allow only so (PR_SET_PTRACER).
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
    whole = make(case)
    tensor = whole[1000:2000]
    if case == "refused":
        refused(tensor)
        return
    context = mp.get_context("spawn")
    tensors, words = context.Queue(), context.Queue()
    process = context.Process(target=receive, args=(tensors, words))
    process.start()
    try:
        # Taken before: the other one writes as soon as it has told what it received.
        sent = float(tensor.sum())
        tensors.put(tensor)
        print("received:", words.get(timeout=PATIENCE) == sent)
        total, held = words.get(timeout=PATIENCE)
        print("written:", total == float(tensor.sum()) == sum(range(1001, 2001)), held)
        if case != "plain":
            pause_what_was_sent(whole)
        tensors.put(None)
        print("kept:", words.get(timeout=PATIENCE))
        process.join(PATIENCE)
        print("exit:", process.exitcode)
        print("whole:", float(whole[0]), float(whole[1000]), float(whole[1999]), float(whole[2000]))
    finally:
        process.kill()


def pause_what_was_sent(whole: torch.Tensor) -> None:
    with sire.region("sent", backup="cpu"):
        goes = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
    print("held:", {why: count >= whole.nbytes for why, count in sire.held("sent").items()})
    try:
        sire.pause("sent", held="refuse")
    except sire.UnsupportedError as error:
        print("refused:", error)
    before = used()
    report = sire.pause("sent")
    print("paused:", report.bytes_held > 0, before - used() >= 32 << 20, float(whole[1000]))
    sire.resume("sent")
    print("resumed:", bool((goes == 1).all()))


if __name__ == "__main__":
    main(sys.argv[1])
