"""Figures of the model clock: benches/simulated, which says what they would be on a device that its profile describes. Never of a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .figures import Figure, Target, Unmeasurable, Wrong
from .plan import Sizes
from .workshop import ROOT

GOALS = {
    "pause": Target("ratio", at_least=0.95),
    "resume": Target("ratio", at_least=0.95),
    # At most 1.05 times the copy of what comes, alone.
    "switch.clean": Target("ratio", at_least=1 / 1.05),
    "switch.duplex": Target("ratio", at_least=0.95),
}
PROFILES = ROOT / "crates" / "sire-sim" / "profiles"


def profiles() -> list[str]:
    """The names of those that are built in."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def of_model(figure: Figure, profile: str) -> Figure:
    """The figure, marked as a model's."""
    figure.simulated_on = f"model clock, not a GPU: {json.loads((PROFILES / f'{profile}.json').read_text())['device']}"
    figure.notes.insert(0, "SIMULATED")
    return figure


def program() -> Path:
    """The example, built if need be."""
    named = os.environ.get("SIRE_BENCH_SIMULATED")
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    path = Path(named) if named else target / "release" / "examples" / "simulated"
    if not named and shutil.which("cargo"):
        command = ["cargo", "build", "-q", "--release", "--locked", "-p", "sire-sim", "--example", "simulated"]
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if built.returncode != 0:
            raise Wrong(f"benches/simulated does not build:\n{built.stderr[-2000:]}")
    if not path.is_file():
        raise Unmeasurable(f"{path} is not built, and there is no cargo to build it")
    return path


def simulated(sizes: Sizes, folder: Path) -> list[Figure]:
    """Every figure that the example gives."""
    written = folder / "simulated.json"
    command = [str(program()), "--gib", str(sizes.simulated_gib), "--json", str(written)]
    for profile in sizes.profiles:
        command += ["--profile", profile]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Wrong(f"benches/simulated: {done.stderr.strip()[-1000:]}")
    return [figure(found) for found in map(json.loads, written.read_text().splitlines())]


def figure(found: dict[str, Any]) -> Figure:
    """In this program's form; the values are seconds, so the ratio is the ceiling's share."""
    name = str(found["name"])
    call = name.split(".", 2)[2]
    values = [float(found["min"]), float(found["value"]), float(found["max"])]
    ceiling = float(found["ceiling"])
    made = Figure(name, str(found["unit"]), values, [ceiling] * 3, [ceiling / value for value in values], GOALS.get(call))
    made.simulated_on = str(found["device"])
    made.notes.append(f"SIMULATED; {found['bytes'] / (1 << 30):.0f} GiB; ceiling: the formula in benches/simulated")
    if found.get("note"):
        made.notes.append(str(found["note"]))
    return made
