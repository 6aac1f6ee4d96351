"""Tensors between processes (torch.multiprocessing): what works, what is held, what is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from measure import ALLOC_CONF, BEFORE_2_11

PROGRAM = Path(__file__).with_name("sharing_program.py")

SENT = ["received: True", "written: True {}"]
HELD = [
    "held: {'it was exported to other processes': True}",
    "paused: True True 1001.0",
    "resumed: True",
]


def run(case: str, folder: Path, expandable: bool) -> list[str]:
    """The lines that the program prints; its two processes share a device of their own."""
    variables = os.environ | {"SIRE_SIM_DIR": str(folder), "SIRE_SIM_MEMORY": "512MiB", "SIRE_LOG": "error"}
    variables[ALLOC_CONF] = f"expandable_segments:{expandable}"
    command = [sys.executable, str(PROGRAM), case]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=250, check=False)
    if "pidfd_getfd" in done.stderr:
        pytest.skip("the system lets no process take another one's descriptors, which PyTorch needs")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def test_tensors_outside_regions_are_sent(tmp_path: Path, preloaded: bool) -> None:
    # One of PyTorch's two ways each: a legacy handle, and a descriptor, where regions' pools allow that.
    lines = run("plain", tmp_path, expandable=not preloaded and not BEFORE_2_11)
    assert lines == [*SENT, "kept: True", "exit: 0", "whole: 0.0 1001.0 2000.0 2000.0"]


def test_a_tensor_of_an_expandable_segment_is_sent_and_held(tmp_path: Path, preloaded: bool) -> None:
    if not preloaded:
        pytest.skip("there, regions are not in PyTorch's own segments")
    lines = run("region", tmp_path, expandable=True)
    refusals = [line for line in lines if line.startswith("refused:")]
    assert len(refusals) == 1
    assert "because it was exported to other processes" in refusals[0]
    ends = ["kept: True", "exit: 0", "whole: 0.0 1001.0 2000.0 2000.0"]
    assert [line for line in lines if line not in refusals] == SENT + HELD + ends


def test_expandable_segments_change_nothing_where_regions_are_pools_of_their_own(
    tmp_path: Path, preloaded: bool
) -> None:
    if preloaded:
        pytest.skip("there, regions are in PyTorch's own segments")
    if BEFORE_2_11:
        pytest.skip("PyTorch 2.9: torch.cuda.MemPool doesn't currently support expandable_segments")
    [line] = run("refused", tmp_path, expandable=True)
    assert line.startswith("refused: a tensor of region 'sent' cannot be sent to another process")
    assert "made outside regions" in line
