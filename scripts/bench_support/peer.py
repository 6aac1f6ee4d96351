"""Finds the published torch_memory_saver: its preload library as it is in the wheel, unchanged."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from .figures import Unmeasurable
from .workshop import ROOT, Place, environments

VERSION = "0.0.10"
LIBRARY = "torch_memory_saver_hook_mode_preload_cu13.abi3.so"
KEPT = ROOT / ".sire" / "bench"


def find(named: Path | None, offline: bool) -> Place:
    """The library: as named, from an environment of this checkout, or from the wheel (240 kB to 3 MB, once)."""
    if named is not None:
        if not named.is_file():
            raise Unmeasurable(f"{named} does not exist")
        return Place(f"torch_memory_saver {version_beside(named) or named}", named.resolve())
    installed = [found for path in environments() for found in path.glob(f"lib/python3*/site-packages/{LIBRARY}")]
    unpacked = KEPT / LIBRARY
    if not unpacked.is_file():
        if installed and version_beside(installed[-1]) == VERSION:
            return Place(f"torch_memory_saver {VERSION}", installed[-1])
        if offline:
            raise Unmeasurable(f"torch_memory_saver {VERSION} is not installed, and --offline forbids to fetch its wheel")
        unpack(fetch())
    return Place(f"torch_memory_saver {VERSION}", unpacked)


def version_beside(library: Path) -> str | None:
    """The version of the distribution that the library was installed from."""
    found = sorted(library.parent.glob("torch_memory_saver-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").rpartition("-")[2] if found else None


def fetch() -> Path:
    """The wheel, through pip; torch itself is not needed."""
    KEPT.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(KEPT), f"torch-memory-saver=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(KEPT.glob("torch_memory_saver-*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unmeasurable(f"the wheel of torch-memory-saver {VERSION} could not be fetched: {last}")
    return wheels[-1]


def unpack(wheel: Path) -> None:
    """Takes the one library out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        if LIBRARY not in archive.namelist():
            raise Unmeasurable(f"{wheel.name} has no {LIBRARY}")
        archive.extract(LIBRARY, KEPT)
