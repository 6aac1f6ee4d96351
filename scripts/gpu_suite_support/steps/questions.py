"""Step `questions`: what only a device can answer, one process per question; recorded, not judged.

The one check is that every question got an answer: a process that died or hung says something about the device as
well, and its answer says how it ended.
"""

from __future__ import annotations

from .. import child
from ..context import Context
from ..probes.ask import all_questions
from ..report import Report

SECONDS = 30.0


def run(context: Context, report: Report) -> None:
    """Asks them all."""
    unanswered = []
    total = 0.0
    for name, (text, _) in all_questions().items():
        allowed = context.left(SECONDS)
        if allowed < 1:
            unanswered.append(f"{name} (no time left)")
            continue
        command = context.probe("ask", name, *context.cuda_arguments(), *([] if context.software else ["--big"]))
        outcome = child.run(command, env=context.env(), timeout=allowed)
        total += outcome.seconds
        found = child.last_json(outcome.output)
        if found is None:
            unanswered.append(name)
            report.answer(name, text, None, {"ended": outcome.tail()}, outcome.seconds)
            continue
        for figure in found.pop("figures", []):
            report.figure(**figure)
        report.answer(name, text, found.pop("answer"), found, outcome.seconds)
    report.check("questions.all_answered", not unanswered, ", ".join(unanswered), total)
