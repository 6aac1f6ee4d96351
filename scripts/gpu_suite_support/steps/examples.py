"""Step `examples`: the programs of `examples/`, as their first lines show them, in both hook modes."""

from __future__ import annotations

from .. import child
from ..context import ROOT, Context
from ..report import Report

NAMES = ("simple", "cpu_backup", "rl_example")
MODES = ("preload", "torch")


def run(context: Context, report: Report) -> None:
    """One check per example and mode."""
    for name in NAMES:
        script = ROOT / "examples" / f"{name}.py"
        for mode in MODES:
            check = f"examples.{name}.{mode}"
            if not script.exists():
                report.check(check, False, f"examples/{name}.py is not there")
                continue
            if not context.torch:
                report.check(check, False, "PyTorch is not there")
                continue
            outcome = child.run(
                [context.python, str(script), mode],
                env=context.env(preload=mode == "preload"),
                timeout=context.left(60),
                cwd=ROOT,
            )
            report.check(check, outcome.ok, "" if outcome.ok else outcome.tail(), outcome.seconds)
