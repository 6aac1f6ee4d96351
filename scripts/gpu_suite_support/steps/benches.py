"""Step `benches`: `benches/run.py`, what a hook costs and how long others stall during a pause, on this device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .. import child
from ..context import ROOT, Context
from ..report import Report

SECONDS = {"hooks": 60.0, "stall": 60.0}


def run(context: Context, report: Report) -> None:
    """One check per benchmark; its results become figures."""
    if shutil.which("cc") is None:
        report.check("benches", False, "there is no C compiler (cc) to build benches/*.c with")
        return
    env = context.env() | {"SIRE_ALLOC_SO": str(context.library)}
    if context.software:
        env["SIRE_SIM_SO"] = str((context.stand_in or Path()) / "libcuda.so.1")
    else:
        env["SIRE_BENCH_CUDA"] = str(_libraries(context, report))
    for name, seconds in SECONDS.items():
        results = context.scratch / f"{name}.json"
        command = [context.python, str(ROOT / "benches" / "run.py"), "--quick", "--json", str(results), name]
        outcome = child.run(command, env=env, timeout=context.left(seconds), cwd=ROOT)
        found = json.loads(results.read_text()) if outcome.ok and results.exists() else []
        for result in found:
            report.figure(**{key: value for key, value in result.items() if key not in ("simulated", "device", "ratio")})
        report.check(f"benches.{name}", bool(found), "" if found else outcome.tail(), outcome.seconds)


def _libraries(context: Context, report: Report) -> Path:
    """A folder with this machine's runtime and driver under their plain names."""
    folder = context.scratch / "cuda"
    folder.mkdir(exist_ok=True)
    driver = str((report.environment.get("python") or {}).get("driver") or "")
    for name, target in (("libcudart.so.13", context.runtime), ("libcuda.so.1", driver)):
        link = folder / name
        if target and not link.is_symlink():
            link.symlink_to(Path(target).resolve())
    return folder
