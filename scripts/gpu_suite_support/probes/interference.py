"""Two programs for "another process holds the memory": the one that pauses and resumes, and the occupant.

`owner` allocates, pauses, starts the occupant, resumes in vain, ends the occupant, resumes again and verifies every
byte. `occupant BYTES` takes device memory, says so, and waits for its standard input to close.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from .content import Content
from .cuda import MIB, Cuda
from .sire_c import OUT_OF_DEVICE_MEMORY, Sire, SireError


def occupy(cuda: Cuda, leave: int) -> int:
    """Takes all but `leave` bytes of the device, in pieces; returns how many."""
    taken, piece = 0, 512 * MIB
    granularity = cuda.granularity()
    while piece >= granularity:
        if cuda.free_memory() < leave + piece:
            piece //= 2
            continue
        try:
            cuda.create(piece)
        except Exception:  # whatever the reason, try a smaller piece
            piece //= 2
            continue
        taken += piece
    return taken


def occupant(driver: str, leave: int) -> int:
    """The second process."""
    cuda = Cuda(driver)
    print(json.dumps({"taken": occupy(cuda, leave)}), flush=True)
    sys.stdin.read()
    return 0


def owner(options: argparse.Namespace) -> int:
    """The first process."""
    cuda, sire = Cuda(options.driver), Sire(options.library)
    content = Content(cuda)
    region = sire.region("suite", "cpu")
    size = options.bytes // 4
    addresses = sire.allocate(region, [size] * 4)
    content.write(addresses, size)
    found: dict[str, Any] = {"pause": sire.pause("suite"), "free_while_paused": cuda.free_memory()}
    command = [
        sys.executable,
        "-m",
        "gpu_suite_support.probes.interference",
        "occupant",
        "--driver",
        options.driver,
        "--leave",
        str(options.bytes // 2),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        found["occupant"] = other.stdout.readline().strip()
        before = cuda.free_memory()
        found["first_resume"] = _resume(sire, 0.0)
        found["leaked_by_failed_resume"] = before - cuda.free_memory()
        start = time.monotonic()
        found["resume_with_wait"] = _resume(sire, 0.5)
        found["waited"] = time.monotonic() - start
        other.stdin.close()
    found["last_resume"] = _resume(sire, 10.0)
    found["wrong"] = content.wrong_blocks(addresses, size) if found["last_resume"]["status"] == 0 else None
    found["expected_status"] = OUT_OF_DEVICE_MEMORY
    print(json.dumps(found), flush=True)
    return 0


def _resume(sire: Sire, wait: float) -> dict[str, Any]:
    try:
        return {"status": 0, "report": sire.resume("suite", wait)}
    except SireError as error:
        return {"status": error.status, "name": error.name, "message": error.message}


def main() -> int:
    """Reads the role."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("owner", "occupant"))
    parser.add_argument("--driver", required=True)
    parser.add_argument("--runtime", default="")
    parser.add_argument("--library", default="")
    parser.add_argument("--bytes", type=int, default=0)
    parser.add_argument("--leave", type=int, default=0)
    options = parser.parse_args()
    return owner(options) if options.role == "owner" else occupant(options.driver, options.leave)


if __name__ == "__main__":
    sys.exit(main())
