"""The examples of three seed documents, word for word: with a device, without one, and without the library.

``seed_memory_management.txt``, ``seed_slyce.txt`` and ``seed_torchtools.txt`` are the documents' code blocks, one after
another. What the documents leave to the reader (a class, a configuration, an input) stands in front.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from test_device_modes import environment, why_not

HERE = Path(__file__).resolve().parent

MEMORY = """
import sire.compat
sire.compat.enable()
from memory_management import MemoryManager
"""
SLYCE = """
import os, torch, torch.nn as nn, sire.compat
sire.compat.enable()
class Encoder(nn.Linear): pass
class Decoder(nn.Linear): pass
encoder_cfg = {"in_features": 64, "out_features": 64}
decoder_cfg = (64, 8)
input_tensor = torch.randn(2, 64)
"""
MEMORY_CLAIMS = """
assert summary["system"]["managed_modules"] == 4, summary["system"]
assert summary["system"]["total_offloads"] >= 4
assert set(summary) >= {"timestamp", "gpu", "cpu", "disk", "recommendations", "modules", "system"}
assert output.shape == (32, 10)
assert wrapped_layer.weight.device.type == device.type
assert 0.0 <= summary["gpu"]["usage_ratio"] <= 1.0
manager.cleanup()
"""
SLYCE_CLAIMS = """
assert output.shape == (2, 8)
assert model.active_slice == "decoder"
assert [each.name for each in model.summary().slices] == ["encoder", "decoder"]
assert model.summary().gpu_bytes + model.summary().cpu_bytes == 4 * (64 * 64 + 64 + 64 * 8 + 8)
assert (model.summary().gpu_bytes > 0) == torch.cuda.is_available()
assert "encoder" in open("slyce_cache/slyce.log").read()
print(model.summary())
model.close()
"""
TORCHTOOLS = """
import sire.compat
sire.compat.enable()
"""
TORCHTOOLS_CLAIMS = """
with reserve_gpu_for_training(gpu=0, training_reserved_bytes=1024**2) as reservation:
    print("reserved", reservation.reserved_bytes >= 1024**2, reservation.fence in ("stock", "cache"))
"""
PLACES = ("device", "no device", "no library")


def run(place: str, program: str, directory: Path, as_file: bool = False, **more: str) -> str:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("no PyTorch")
    if place == "device" and why_not() is not None:
        pytest.skip(str(why_not()))
    changes = {"no device": {"CUDA_VISIBLE_DEVICES": ""}, "no library": {"SIRE_LIBRARY": "/nowhere/libsire_alloc.so"}}
    variables = environment(**changes.get(place, {}), **more)
    command = [sys.executable, "-c", program]
    if as_file:
        (directory / "train.py").write_text(program)
        command = [sys.executable, "train.py"]
    done = subprocess.run(
        command,
        env=variables,
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("place", PLACES)
def test_the_memory_management_document(place: str, tmp_path: Path) -> None:
    said = run(place, MEMORY + (HERE / "seed_memory_management.txt").read_text() + MEMORY_CLAIMS, tmp_path)
    lines = said.splitlines()
    assert lines[0].startswith("GPU usage: ")
    assert lines[1:3] == ["Managed modules: 4", f"Total offloads: {lines[2].split()[-1]}"]


@pytest.mark.parametrize("place", PLACES)
def test_the_slyce_document(place: str, tmp_path: Path) -> None:
    said = run(place, SLYCE + (HERE / "seed_slyce.txt").read_text() + SLYCE_CLAIMS, tmp_path)
    assert "strategy limit_gpu: GPU" in said


@pytest.mark.parametrize("place", PLACES)
def test_the_torchtools_document(place: str, tmp_path: Path) -> None:
    # A file, as users have it: it reserves and trains at its top level, and the probe's process must not.
    program = TORCHTOOLS + (HERE / "seed_torchtools.txt").read_text() + TORCHTOOLS_CLAIMS
    own = {"TORCHTOOLS_LOCK_DIR": str(tmp_path), "SIRE_SIM_MEMORY": "8GiB"}
    lines = run(place, program, tmp_path, as_file=True, **own).splitlines()
    assert lines[:-1] == ["Training start", *(f"step {step}" for step in range(5)), "Training end"]
    assert lines[-1] == ("reserved True True" if place == "device" else "reserved False False")


@pytest.mark.parametrize("name", ["memory", "slyce"])
def test_the_examples_keep_their_claims(name: str, tmp_path: Path) -> None:
    path = HERE.parents[1] / "examples" / f"{name}.py"
    said = run("device", f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')", tmp_path)
    assert said.count("ok: ") >= 5
    assert "FAILED" not in said
