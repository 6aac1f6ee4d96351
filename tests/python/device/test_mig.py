"""A GPU that is divided (MIG): each part is a device of its own, under the UUID that NVML has for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from measure import MIB, driver_of_software_device, on_software_device
from running import line, running

# What NVML says there is: GPUs, and the parts of the first one.
PARTS = """
import ctypes, json, sys
nvml = ctypes.CDLL(sys.argv[1])
count, current, pending = (ctypes.c_uint() for _ in range(3))
gpu, same = ctypes.c_void_p(), ctypes.c_void_p()
text = ctypes.create_string_buffer(96)
assert nvml.nvmlInit_v2() == nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
gpus = count.value
assert nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu)) == 0
assert nvml.nvmlDeviceGetMigMode(gpu, ctypes.byref(current), ctypes.byref(pending)) == 0
assert nvml.nvmlDeviceGetMaxMigDeviceCount(gpu, ctypes.byref(count)) == 0
found = []
for index in range(count.value):
    part = ctypes.c_void_p()
    assert nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index, ctypes.byref(part)) == 0
    assert nvml.nvmlDeviceGetUUID(part, text, 96) == 0
    found.append(text.value.decode())
    assert nvml.nvmlDeviceGetHandleByUUID(text, ctypes.byref(same)) == 0 and same.value == part.value
    assert nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part, ctypes.byref(same)) == 0 and same.value == gpu.value
print(json.dumps([gpus, current.value, found]))
"""

# A program that was given one part: what it sees, and what a pause gives back.
PROGRAM = """
import json, os, sire, torch
if os.environ["SIRE_TEST_MODE"] == "allocator":
    sire.use_allocator()
from measure import device_used
with sire.region("weights", backup="cpu"):
    tensor = torch.arange(6 << 20, dtype=torch.int32, device="cuda")
expected = tensor.sum().item()
where, before = tensor.data_ptr(), device_used()
sire.pause("weights")
away = before - device_used()
sire.resume("weights")
back = device_used() - before
same = tensor.data_ptr() == where and tensor.sum().item() == expected
free, total = torch.cuda.mem_get_info()
print(json.dumps([torch.cuda.device_count(), torch.cuda.get_device_name(0), total, away, back, same]))
"""

# Bytes of the part that CUDA_VISIBLE_DEVICES names, until its input ends; or that they cannot be had.
RESERVE = """
import sys
import sire
from sire import torchtools
try:
    with torchtools.reserve_gpu_for_training(0, int(sys.argv[1]), 0, timeout=float(sys.argv[2]), fence=False):
        print("had", flush=True)
        sys.stdin.read()
except sire.ReservationTimeoutError:
    print("missed", flush=True)
"""


@pytest.fixture
def divided(tmp_path: Path) -> dict[str, str]:
    """An environment with one GPU of 512 MiB in two parts."""
    if not on_software_device():
        pytest.skip("there may be one device only")
    here = str(Path(__file__).resolve().parent)
    python_path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    (tmp_path / "device").mkdir()
    (tmp_path / "ledger").mkdir()
    own = {"SIRE_SIM_MIG": "2", "SIRE_SIM_DEVICES": "1", "SIRE_SIM_MEMORY": "512MiB", "PYTHONPATH": python_path}
    places = {"SIRE_SIM_DIR": str(tmp_path / "device"), "TORCHTOOLS_LOCK_DIR": str(tmp_path / "ledger")}
    return {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | own | places


def said(code: str, environment: dict[str, str], *arguments: str) -> list[object]:
    """What a program prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def parts(environment: dict[str, str]) -> list[str]:
    driver = driver_of_software_device()
    assert driver is not None
    gpus, divided, found = said(PARTS, environment, str(Path(driver).with_name("libnvidia-ml.so.1")))
    assert (gpus, divided) == (1, 1)
    assert isinstance(found, list)
    assert len(set(found)) == 2
    assert all(uuid.startswith("MIG-") for uuid in found)
    return found


def test_a_part_of_a_gpu_is_a_device(divided: dict[str, str]) -> None:
    second = parts(divided)[1]
    count, name, total, away, back, same = said(PROGRAM, divided | {"CUDA_VISIBLE_DEVICES": second})
    assert (count, total, same) == (1, 256 * MIB, True)
    assert isinstance(name, str)
    assert name.endswith("MIG")
    assert isinstance(away, int)
    assert away >= 24 * MIB
    assert back == 0


@contextmanager
def asking(size: int, patience: float, environment: dict[str, str], uuid: str) -> Iterator[subprocess.Popen[str]]:
    """A process that asks for bytes of a part."""
    command = [sys.executable, "-c", RESERVE, str(size), str(patience)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(command, env=environment | {"CUDA_VISIBLE_DEVICES": uuid}, **pipes) as child:
        yield child


def test_parts_of_one_gpu_do_not_exclude_each_other_and_the_same_part_does(divided: dict[str, str], mode: str) -> None:
    if mode != "torch":
        pytest.skip("the process is the same in every mode")
    first, second = parts(divided)
    with asking(200 * MIB, 200, divided, first) as holder:
        assert line(holder) == "had"
        with asking(200 * MIB, 200, divided, second) as beside:
            assert line(beside) == "had"
        with asking(200 * MIB, 0, divided, first) as late:
            assert line(late) == "missed"
        # Each has a ledger under the name that NVML has for it, by which `sire reserve --gpu` and others find it, too.
        ledgers = {path.name for path in Path(divided["TORCHTOOLS_LOCK_DIR"]).glob("sire-ledger-*")}
        assert ledgers == {f"sire-ledger-{uuid}" for uuid in (first, second)}
