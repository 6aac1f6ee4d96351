"""Step `interference`: another process takes the memory of a paused region; resume fails cleanly and works once it is
free.
"""

from __future__ import annotations

from typing import Any

from .. import child
from ..context import Context
from ..report import Report


def run(context: Context, report: Report) -> None:
    """Judges what the two processes of `probes/interference.py` saw."""
    size = (256 << 20) if context.software else (8 << 30)
    command = context.probe("interference", "owner", *context.cuda_arguments(), "--library", str(context.library), "--bytes", str(size))
    outcome = child.run(command, env=context.env(shared="interference"), timeout=context.left(60))
    found = child.last_json(outcome.output)
    if found is None:
        report.check("interference", False, outcome.tail(), outcome.seconds)
        return
    for name, passed, detail in judge(found):
        report.check(f"interference.{name}", passed, detail, outcome.seconds)


def judge(found: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """The checks, from what the owner saw."""
    first, waited, last = found["first_resume"], found["resume_with_wait"], found["last_resume"]
    expected = found["expected_status"]
    return [
        ("resume_without_room_is_refused", first["status"] == expected, str(first)),
        (
            "failed_resume_keeps_no_memory",
            found["leaked_by_failed_resume"] <= 0,
            f"{found['leaked_by_failed_resume']} bytes",
        ),
        (
            "wait_budget_is_kept",
            waited["status"] == expected and 0.4 < found["waited"] < 5,
            f"{waited}, {found['waited']:.2f} s",
        ),
        ("resume_works_when_memory_is_free", last["status"] == 0, str(last)),
        ("every_byte_survives", found["wrong"] == [], f"wrong blocks: {found['wrong']}"),
    ]
