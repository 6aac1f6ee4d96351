"""Step `hooks`: nanoseconds and driver calls per cudaMalloc and cudaFree, plain, passed through, and in a region."""

from __future__ import annotations

from typing import Any

from .. import child
from ..compile import program
from ..context import SUPPORT, Context
from ..report import Report


def run(context: Context, report: Report) -> None:
    """Runs `hook_cost.c` without and with the library; the plain run is the other's ceiling."""
    binary, reason = program(context, "hook_cost", SUPPORT / "hook_cost.c")
    if binary is None:
        report.check("hooks", False, reason)
        return
    found: dict[str, dict[str, Any]] = {}
    operations = "300" if context.software else "2000"
    for label, preload in (("plain", False), ("preload", True)):
        outcome = child.run([str(binary), operations], env=context.env(preload=preload), timeout=context.left(60))
        result = child.last_json(outcome.output)
        report.check(f"hooks.{label}", result is not None, "" if result else outcome.tail(), outcome.seconds)
        if result is not None:
            found[label] = result
    live = found.get("preload", {}).get("sire") is True
    report.check("hooks.library_is_preloaded", live, "" if live else "hook_cost did not see sire_region_open")
    for label, result in found.items():
        _figures(report, label, result, found.get("plain", {}))


def _figures(report: Report, label: str, result: dict[str, Any], plain: dict[str, Any]) -> None:
    """One figure per measured call; what is passed through is compared with the plain call."""
    for case, measured in result.items():
        if not isinstance(measured, dict):
            continue
        for verb in ("malloc", "free"):
            bare = plain.get(case) if label == "preload" else None
            report.figure(
                f"hooks.{label}.{case}.{verb}",
                measured[f"{verb}_ns"],
                "ns",
                samples=measured["samples"],
                p99=measured[f"{verb}_p99_ns"],
                driver_calls_per_pair=measured["driver_calls_per_pair"],
                **({"plain": bare[f"{verb}_ns"]} if bare else {}),
            )
    report.write()
