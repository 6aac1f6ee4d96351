"""Step `examples`: the programs of `examples/`, as their first lines show them, in both hook modes where they take one."""

from __future__ import annotations

from .. import child
from ..context import ROOT, Context
from ..report import Report

NAMES = ("simple", "cpu_backup", "rl_example", "sire_models", "preemption")
MODES = ("preload", "torch")
# These choose by themselves, and run without a device, too: the preloaded library is the stricter one.
FREE = ("memory", "slyce", "run_with_reservation_example", "time_slices")


def run(context: Context, report: Report) -> None:
    """One check per example and mode."""
    for name in NAMES:
        for mode in MODES:
            one(context, report, name, mode, [mode])
    for name in FREE:
        one(context, report, name, "preload", [])


def one(context: Context, report: Report, name: str, mode: str, arguments: list[str]) -> None:
    """One run of one example."""
    check, script = f"examples.{name}.{mode}", ROOT / "examples" / f"{name}.py"
    if not script.exists():
        return report.check(check, False, f"examples/{name}.py is not there")
    if not context.torch:
        return report.check(check, False, "PyTorch is not there")
    outcome = child.run([context.python, str(script), *arguments], env=context.env(preload=mode == "preload"), timeout=context.left(90), cwd=ROOT)
    return report.check(check, outcome.ok, "" if outcome.ok else outcome.tail(), outcome.seconds)
