"""Step `kit`: what this device can do and how much of it Sire reaches: ceilings, virtual-memory calls, pinning, every mode of pause and
resume, switching between two models, the disk, and what a pause costs its neighbours. Every byte is compared; a wrong one fails the run.
"""

from __future__ import annotations

from pathlib import Path

from .. import child, pictures
from ..context import Context
from ..report import Report

# Part, and most seconds on a GPU. Together they leave the suite under ten minutes.
PARTS = {"limits": 45, "pinning": 45, "vmm": 60, "transfer": 150, "switch": 90, "beside": 20, "disk": 60}
# Of these, what a part keeps for its end.
SPARE = 5.0


def run(context: Context, report: Report) -> None:
    """One check per part; then the pictures."""
    for part, allowed in PARTS.items():
        _one(context, report, part, float(allowed))
    drawn = pictures.draw(report.as_dict(), report.path)
    report.environment["pictures"] = [Path(path).name for path in drawn] or "matplotlib is not installed in this Python"


def _one(context: Context, report: Report, part: str, allowed: float) -> None:
    directory = context.scratch / "disk"
    directory.mkdir(exist_ok=True)
    command = context.probe("kit", part, *context.cuda_arguments(), "--library", str(context.library))
    seconds = context.left(allowed)
    # What a part leaves out for want of time is a note; what is cut off has lost everything.
    command += ["--directory", str(directory), "--seconds", str(max(seconds - SPARE, 0.0)), *([] if context.software else ["--big"])]
    env = context.env(SIRE_LOG="error") | ({"SIRE_SIM_TIMING": "1"} if context.software else {})
    outcome = child.run(command, env=env, timeout=seconds)
    found = child.last_json(outcome.output)
    if found is None:
        report.check(f"kit.{part}", False, outcome.tail(), outcome.seconds)
        return
    report.take_figures(found["figures"])
    if found["notes"]:
        report.environment.setdefault("kit", {})[part] = found["notes"]
    wrong = found["wrong"]
    report.check(f"kit.{part}", not wrong, f"WRONG BYTES: {wrong[:10]}" if wrong else "", outcome.seconds)
