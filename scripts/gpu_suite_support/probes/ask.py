"""Asks one question of a device: `python -m gpu_suite_support.probes.ask NAME --driver FILE [--runtime FILE]`.

A question is a function marked `@question("...")` in one of the `questions_*` modules. It gets a `Bench` and returns
`{"answer": ..., **data}`; `"figures"` in the data become figures of the report. Each question runs in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cuda import Cuda, CudaError


@dataclass(frozen=True)
class Bench:
    """What a question may use."""

    driver: str
    runtime: str
    big: bool

    def cuda(self, *, context: bool = True) -> Cuda:
        """The driver, loaded on demand: some questions are about what happens before."""
        return Cuda(self.driver, context=context)


Question = Callable[[Bench], dict[str, Any]]
QUESTIONS: dict[str, tuple[str, Question]] = {}


def question(text: str) -> Callable[[Question], Question]:
    """Registers the function under its own name."""

    def register(function: Question) -> Question:
        QUESTIONS[function.__name__] = (text, function)
        return function

    return register


def all_questions() -> dict[str, tuple[str, Question]]:
    """Every question, in the order in which they are asked."""
    from . import questions_capture, questions_copy, questions_cost, questions_mapping, questions_runtime  # noqa: F401

    return QUESTIONS


def main() -> int:
    """Asks, and prints the answer as a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--driver", required=True)
    parser.add_argument("--runtime", default="")
    parser.add_argument("--big", action="store_true")
    options = parser.parse_args()
    # Under `-m` this module is `__main__`; the questions registered themselves in its twin.
    from gpu_suite_support.probes import ask  # noqa: PLW0406

    _, function = ask.all_questions()[options.name]
    try:
        result = function(ask.Bench(options.driver, options.runtime, options.big))
    except (CudaError, OSError) as error:
        result = {"answer": None, "not_asked": str(error)}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
