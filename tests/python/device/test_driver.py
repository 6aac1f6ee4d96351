"""PyTorch and, in the same process, somebody who asks the driver: in hook mode driver both are heard."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sire
import torch
from measure import MIB, device_used

pytestmark = pytest.mark.skipif(os.environ.get("SIRE_TEST_MODE") != "driver", reason="driver-level hooks are not there")


@pytest.fixture(scope="module")
def driver() -> ctypes.CDLL:
    """The driver, as other packages find it."""
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    # By the file: PyTorch's own copy is not in the loader's way.
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split(maxsplit=5)[5] for line in lines if "/" in line]
    paths = [path for path in maps if "libcuda.so" in path or "libsire_sim_cuda" in path or "libcudart" in path]
    return ctypes.CDLL(paths[0])


def allocated(driver: ctypes.CDLL, size: int) -> int:
    address = ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0
    return address.value


def test_one_region_for_tensors_and_for_the_drivers_memory(driver: ctypes.CDLL, tag: str) -> None:
    size = 32 * MIB
    with sire.region(tag, backup="cpu"):
        tensor = torch.full((size,), 7, dtype=torch.uint8, device="cuda")
        address = allocated(driver, size)
    pattern = bytes(range(256)) * 16
    assert driver.cuMemcpyHtoD_v2(ctypes.c_uint64(address), pattern, ctypes.c_size_t(len(pattern))) == 0
    before = device_used()
    sire.pause(tag)
    assert before - device_used() >= 2 * size
    sire.resume(tag)
    back = ctypes.create_string_buffer(len(pattern))
    assert driver.cuMemcpyDtoH_v2(back, ctypes.c_uint64(address), ctypes.c_size_t(len(pattern))) == 0
    assert back.raw == pattern
    assert bool((tensor == 7).all())
    assert driver.cuMemFree_v2(ctypes.c_uint64(address)) == 0


def test_outside_regions_all_is_the_drivers(driver: ctypes.CDLL) -> None:
    passed = sire.stats()["driver_hooks"]["allocate"]
    address = allocated(driver, MIB)
    assert sire.stats()["driver_hooks"]["allocate"] == passed + 1
    assert driver.cuMemFree_v2(ctypes.c_uint64(address)) == 0
    assert driver.cuMemFree_v2(ctypes.c_uint64(address)) == 1


def test_children_are_heard_too() -> None:
    with sire.region("before"):
        pass
    code = """
import sire, torch
with sire.region("a"):
    torch.zeros(1, device="cuda")
print(sire.hook_mode, sire.stats()["driver_hooks"]["live"])
"""
    with sire.configure_subprocess():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert (done.stdout, done.stderr) == ("driver True\n", "")
