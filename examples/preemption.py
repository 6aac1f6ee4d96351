"""Preemption by agreement: a server lends the memory of a model that lies idle to a job that does not fit beside it, and gets it back.

Both sides are in this file; the job is a second process. Any hook mode: ``python examples/preemption.py torch``.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import NoReturn

import sire
from common import check, fitting, hook_mode

MIB = 1024**2


def job(size: int) -> NoReturn:
    """The needer: it waits for memory, uses it, and ends."""
    import torch

    torch.cuda.init()
    with sire.wait_for_memory(size, timeout=120):
        work = torch.ones(size - 8 * MIB, dtype=torch.uint8, device="cuda")
        print(f"the job has      {sire.format_size(work.numel())}")
    sys.exit(0)


def serve() -> None:
    """The owner: it passes safe points between requests."""
    import torch

    hook_mode()
    free, _ = torch.cuda.mem_get_info()
    size = fitting(256 * MIB, 0.6) // MIB * MIB
    with sire.region("model", backup="cpu"):
        model = torch.full((size,), 7, dtype=torch.uint8, device="cuda")
    expected = model.cpu()
    print(f"the model has    {sire.format_size(size)}")
    with sire.reclaimable("model", after_idle=600) as mark:
        # Nobody has asked it anything for an hour: what kernels do Sire does not see, so the program says so.
        mark.used(seconds_ago=3600)
        needed = free - size // 2
        with subprocess.Popen([sys.executable, __file__, "job", str(needed)]) as process:
            while process.poll() is None:
                sire.safe_point()
                time.sleep(0.01)
        check(process.returncode == 0, "the job got what it needed")
        sire.safe_point()
        until = time.monotonic() + 60
        while mark.figures["state"] != "resident" and time.monotonic() < until:
            sire.safe_point()
            time.sleep(0.01)
        check(mark.figures["state"] == "resident", "the model came back")
    check(bool(torch.equal(model.cpu(), expected)), "the model is back with every byte")
    print("the model is back, every byte as it was")


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        job(int(sys.argv[2]))
    serve()
