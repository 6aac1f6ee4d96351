"""The result: environment, checks, answers and figures, written to the output file after every addition.

A *check* passed or failed. An *answer* is what the device did when asked a question of `probes/questions_*.py`; there
is no right one. A *figure* is a measurement, with the ceiling of the same run where there is one.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Report:
    """Everything that the suite has found so far."""

    path: Path
    device: str
    environment: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    # Folders of this machine that say nothing to a reader, and what is written in their place.
    shorten: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def check(self, name: str, passed: bool, detail: str = "", seconds: float = 0.0) -> None:
        """Adds a check."""
        self.checks.append({"name": name, "passed": passed, "detail": detail[-2000:], "seconds": round(seconds, 3)})
        self.write()

    def answer(self, name: str, question: str, answer: Any, data: dict[str, Any], seconds: float) -> None:
        """Adds what the device did when it was asked `question`."""
        self.answers.append({"name": name, "question": question, "answer": answer, "data": data, "seconds": round(seconds, 3)})
        self.write()

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        ceiling: float | None = None,
        samples: int | None = None,
        **more: Any,
    ) -> None:
        """Adds a measurement; with a `ceiling`, also the share of it that was reached."""
        found: dict[str, Any] = {"name": name, "value": value, "unit": unit}
        if ceiling is not None:
            found["ceiling"] = ceiling
            found["ratio"] = value / ceiling if ceiling else None
        if samples is not None:
            found["samples"] = samples
        found |= {"simulated": False, "device": self.device} | more
        self.figures.append(found)

    def take_figures(self, figures: list[dict[str, Any]]) -> None:
        """Adds figures that a child measured, given as keyword arguments of `figure`."""
        for figure in figures:
            self.figure(**figure)
        self.write()

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not pass."""
        return [check["name"] for check in self.checks if not check["passed"]]

    def as_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "schema": SCHEMA,
            "device": self.device,
            "simulated": False,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "finished": self.finished,
            "passed": self.finished and not self.failed,
            "environment": self.environment,
            "steps": self.steps,
            "checks": self.checks,
            "answers": self.answers,
            "figures": self.figures,
        }

    def write(self) -> None:
        """Replaces the output file, so that a run that is cut off leaves what it had."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        text = json.dumps(self.as_dict(), indent=1, default=str)
        for folder, short in self.shorten.items():
            text = text.replace(json.dumps(folder)[1:-1], short)
        beside.write_text(text + "\n")
        os.replace(beside, self.path)
