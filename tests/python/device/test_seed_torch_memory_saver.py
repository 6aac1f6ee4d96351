"""Every example of the document that torch_memory_saver's interface was taken from, word for word.

Only the device's name (``cuda``) and, unless SIRE_TEST_FULL_SIZES=1, the sizes differ.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sire
import torch
from measure import MIB, device_used, stranger
from sire.torch_memory_saver import torch_memory_saver

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"

BASIC = """
# 1. For tensors that wants to be paused, create them within `region`
with torch_memory_saver.region():
    pauseable_tensor = torch.full((1_000_000_000,), 100, dtype=torch.uint8, device='cuda')

# 2. After `pause`, NPU memory is released for those tensors.
# For example, check `npu-smi info`'s memory usage to verify.
torch_memory_saver.pause()

# 3. After `resume`, NPU memory is re-occupied for those tensors.
torch_memory_saver.resume()
"""

TAGS = """
# 1. Create tensors with different tags
with torch_memory_saver.region(tag="type1"):
    tensor1 = torch.full((5_000_000_000,), 100, dtype=torch.uint8, device='cuda')

with torch_memory_saver.region(tag="type2"):
    tensor2 = torch.full((5_000_000_000,), 100, dtype=torch.uint8, device='cuda')

# 2. Pause and resume with different tags selectively
torch_memory_saver.pause("type1")
torch_memory_saver.pause("type2")

torch_memory_saver.resume("type2")
torch_memory_saver.resume("type1")

torch_memory_saver.pause("type1")
torch_memory_saver.resume("type1")
"""

BACKUP = """
with torch_memory_saver.region(enable_cpu_backup=True):
    tensor1 = torch.full((5_000_000_000,), 42, dtype=torch.uint8, device='cuda')

torch_memory_saver.pause()
torch_memory_saver.resume()

assert tensor1[0] == 42, "content is kept unchanged"
"""


class Watched:
    """The document's object, with the device's used bytes noted after every pause and resume."""

    def __init__(self) -> None:
        self.used: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch_memory_saver, name)
        if name not in ("pause", "resume"):
            return found

        def noted(tag: str | None = None) -> None:
            before = device_used()
            found(tag)
            self.used.append((name, device_used() - before))

        return noted


def run(example: str) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    if os.environ.get("SIRE_TEST_FULL_SIZES") != "1":
        example = example.replace("1_000_000_000", "100_000_000").replace("5_000_000_000", "200_000_000")
    watched = Watched()
    names: dict[str, Any] = {"torch": torch, "torch_memory_saver": watched}
    exec(compile(example, "the document", "exec"), names)  # noqa: S102
    return names, watched.used


def test_basic_example() -> None:
    names, used = run(BASIC)
    size = names["pauseable_tensor"].numel()
    assert [name for name, _ in used] == ["pause", "resume"]
    assert used[0][1] <= -size
    assert used[1][1] == -used[0][1]


def test_multiple_tags() -> None:
    names, used = run(TAGS)
    size = names["tensor1"].numel()
    assert [name for name, _ in used] == ["pause", "pause", "resume", "resume", "pause", "resume"]
    assert all((-1 if name == "pause" else 1) * change >= size for name, change in used)


def test_cpu_backup() -> None:
    names, used = run(BACKUP)
    assert bool((names["tensor1"] == 42).all())
    assert used[0][1] <= -names["tensor1"].numel()


def test_hook_modes(mode: str) -> None:
    torch_memory_saver.hook_mode = mode
    with torch_memory_saver.region(tag="mode"):
        torch.ones(1, device="cuda")
    assert torch_memory_saver.hook_mode == mode
    with pytest.raises(ValueError, match="in use"):
        torch_memory_saver.hook_mode = "preload" if mode == "torch" else "torch"


@pytest.mark.parametrize("name", ["simple.py", "cpu_backup.py", "rl_example.py", "file_backup.py"])
def test_commands(name: str, mode: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "SIRE_HOOK_MODE")}
    environment |= {"SIRE_EXAMPLE_BYTES": str(64 * MIB)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), mode],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.count("ok: ") >= 4


def test_commands_explain_themselves() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "simple.py")], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode != 0
    assert "preload|driver|torch|allocator" in done.stderr


def test_one_tensor_of_a_region_can_stay() -> None:
    size = 64 * MIB
    with torch_memory_saver.region(tag="mixed", enable_cpu_backup=True, cpu_backup_backend="mmap"):
        stays = torch.full((size,), 17, dtype=torch.uint8, device="cuda")
        goes = torch.full_like(stays, 29)
    kept = torch_memory_saver.keep_resident(stays[1024:2048])
    assert kept >= size
    assert torch_memory_saver.keep_resident(stays) == kept
    assert torch_memory_saver.keep_resident(stays[:0]) == 0
    assert torch_memory_saver.keep_resident(stranger(lambda: torch.empty(1, device="cuda"))) == 0
    for cycle, tag in enumerate(("mixed", None, "mixed")):
        torch.cuda.synchronize()
        before = device_used()
        torch_memory_saver.pause(tag)
        # Pausing everything takes what other tests have left in their pools, too, and gives some of it back for good.
        assert before - device_used() >= size
        assert device_used() >= size
        stays.add_(1)
        with pytest.raises(sire.PausedError, match="keep memory resident"):
            torch_memory_saver.keep_resident(goes)
        torch_memory_saver.resume(tag)
        assert tag is None or device_used() == before
        assert bool((stays == 18 + cycle).all())
        assert bool((goes == 29).all())
