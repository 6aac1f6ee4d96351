"""Step `timings`: pause and resume through the C ABI, cold and warm, as a share of a plain pinned copy of the same
bytes.
"""

from __future__ import annotations

from .. import child
from ..context import Context
from ..report import Report

MIB = 1 << 20


def run(context: Context, report: Report) -> None:
    """Every combination in a process of its own, so that each has its own cold cycle."""
    sizes = [256 * MIB] if context.software else [2048 * MIB, 8192 * MIB]
    for size in sizes:
        for backup, retain, allocations in (
            ("none", False, 4),
            ("cpu", False, 4),
            ("cpu", True, 4),
            ("cpu", True, 256),
        ):
            _one(context, report, size, backup, retain, allocations)


def _label(size: int, backup: str, retain: bool, allocations: int) -> str:
    amount = f"{size >> 30}GiB" if size >= 1 << 30 else f"{size >> 20}MiB"
    return ".".join([amount, backup + ("+retain" if retain else ""), f"x{allocations}"])


def _one(context: Context, report: Report, size: int, backup: str, retain: bool, allocations: int) -> None:
    label = _label(size, backup, retain, allocations)
    command = context.probe(
        "pause_resume",
        *context.cuda_arguments(),
        "--library",
        str(context.library),
        "--bytes",
        str(size),
        "--backup",
        backup,
        "--allocations",
        str(allocations),
        "--label",
        label,
        "--cycles",
        "3" if context.software else "4",
        *(["--retain"] if retain else []),
    )
    env = context.env() | ({"SIRE_SIM_TIMING": "1"} if context.software else {})
    outcome = child.run(command, env=env, timeout=context.left(60))
    found = child.last_json(outcome.output)
    if found is None:
        report.check(f"timings.{label}", False, outcome.tail(), outcome.seconds)
        return
    report.take_figures(found["figures"])
    # A GPU's driver takes a few MiB for the first streams and events, in the same moment.
    slack = 0 if context.software else 32 * MIB
    short = [given for given in found["given_back"] if given < size - slack]
    detail = f"wrong blocks: {found['wrong'][:10]}; bytes given back below {size}: {short}" if found["wrong"] or short else ""
    report.check(f"timings.{label}", not found["wrong"] and not short, detail, outcome.seconds)
