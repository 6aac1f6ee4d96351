"""Another process that takes device memory and holds it until its standard input closes.

Uses the CUDA runtime directly (no PyTorch, no Sire), as a stranger on the same GPU would.
Usage: occupant.py RUNTIME LEAVE_BYTES [SECONDS]
"""

from __future__ import annotations

import ctypes
import sys
import time

STEP = 16 << 20


def main() -> int:
    runtime = ctypes.CDLL(sys.argv[1])
    leave = int(sys.argv[2])
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) != 0:
        print("no device", flush=True)
        return 1
    held = 0
    pointer = ctypes.c_void_p()
    while free.value - leave >= STEP and runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(STEP)) == 0:
        held += STEP
        runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    print(held, flush=True)
    if len(sys.argv) > 3:
        time.sleep(float(sys.argv[3]))
    else:
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
