"""Two devices: memory of regions is reachable from both as PyTorch's own is, or it is said that it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from measure import on_software_device

PROGRAM = """
import ctypes, warnings
import sire, torch
runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")

def reaches(device, tensor):
    yes = ctypes.c_int()
    address, size = ctypes.c_uint64(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
    assert runtime.sire_sim_accessible(address, size, device, 1, ctypes.byref(yes)) == 0
    return yes.value == 1

if not linked:
    torch.cuda.can_device_access_peer = lambda device, peer: False
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    with sire.region("first", backup="cpu", device=0):
        first = torch.full((1 << 20,), 2.0, device="cuda:0")
    alone = len(said)
    for _ in range(2):
        with sire.region("second", backup="cpu", device=1), torch.cuda.device(1):
            second = torch.full((1 << 20,), 3.0, device="cuda:1")
texts = [str(each.message) for each in said if "no peer access" in str(each.message)]
print(alone, len(texts))
print(reaches(1, first), reaches(0, second))
def crosses():
    there, back = first.to("cuda:1"), second.to("cuda:0")
    print(bool((there == 2).all()), bool((back == 3).all()), reaches(1, first), reaches(0, second))
if linked:
    crosses()
sire.pause()
sire.resume()
print(reaches(1, first), reaches(0, second))
if linked:
    crosses()
"""


def run(linked: bool) -> list[str]:
    variables = os.environ | {"SIRE_SIM_DEVICES": "2", "SIRE_SIM_MEMORY": "256MiB"}
    command = [sys.executable, "-c", f"linked = {linked}\n{PROGRAM}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_devices_reach_each_others_regions_where_they_can(expandable_segments: bool) -> None:
    """Also before anybody enables it: preloaded, the library heard of it when PyTorch first copied; of NCCL, never."""
    if not on_software_device():
        pytest.skip("only the software device can be asked, or made to fail")
    # Who may touch expandable segments says PyTorch, which maps them.
    before = not expandable_segments
    copied = "True True True True"
    assert run(linked=True) == ["0 0", f"{before} {before}", copied, "True True", copied]


def test_devices_without_a_way_to_each_other_are_named(mode: str, expandable_segments: bool) -> None:
    if mode not in ("torch", "preload") or expandable_segments:
        pytest.skip("the process is the same in every mode")
    if not on_software_device():
        pytest.skip("only the software device can be asked, or made to fail")
    assert run(linked=False) == ["0 2", "False False", "False False"]
