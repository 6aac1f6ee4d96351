"""A program of Sire's that the command sees from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT, clean_environment
from running import running

PROGRAM = """
import time
import sire
from sire import _library

with sire.region("model/weights", backup="cpu"):
    weights = _library.load().allocate(32 << 20, 0)
with sire.region("scratch <b>x</b>"):
    scratch = _library.load().allocate(16 << 20, 0)
print("ready", flush=True)
while True:
    sire.safe_point()
    time.sleep(0.002)
"""


class Outside:
    """A program of Sire's, and the command as another process of its user."""

    def __init__(self, command: Path, library: Path, stand_in: Path, root: Path, program: str = PROGRAM, **more: Path) -> None:
        self.command = command
        self.environment = clean_environment(XDG_RUNTIME_DIR=root, TERM="xterm-256color", **more)
        own: dict[str, str | Path | None] = {
            **more,
            "PYTHONPATH": ROOT / "python-shim" / "src",
            "SIRE_LIBRARY": library,
            "SIRE_LIBCUDA": stand_in,
            "SIRE_CONTROL": "1",
            "SIRE_SIM_MEMORY": "256MiB",
        }
        self.program = running([sys.executable, "-c", program], 900, env=clean_environment(XDG_RUNTIME_DIR=root, **own), stdout=subprocess.PIPE)
        self.process = self.program.__enter__()

    def close(self) -> None:
        self.program.__exit__(None, None, None)

    @property
    def pid(self) -> str:
        return str(self.process.pid)

    def run(self, *arguments: str | int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.command), *map(str, arguments)], env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def view(self) -> dict[str, Any]:
        view: dict[str, Any] = json.loads(self.run("ps", "--json").stdout)
        return view

    def resident(self) -> int:
        """By the device's own figures."""
        [device] = self.view()["devices"]
        return int(device["total_bytes"] - device["free_bytes"])
