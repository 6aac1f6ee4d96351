"""The steps, in the order in which they run: what is cheapest and most telling first, the long tests last."""

from __future__ import annotations

from collections.abc import Callable

from ..context import Context
from ..report import Report
from . import benches, conformance, environment, examples, interference, kit, preload, pytests, questions, saver, timings

Step = Callable[[Context, Report], None]

STEPS: dict[str, Step] = {
    "environment": environment.run,
    "conformance": conformance.run,
    "questions": questions.run,
    "timings": timings.run,
    "kit": kit.run,
    "interference": interference.run,
    "examples": examples.run,
    "saver": saver.run,
    "benches": benches.run,
    "preload": preload.run,
    "python": pytests.run,
}
