"""Tests of the tests: no program is started without a time limit, so that none that hangs holds up all others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
RUNS = {"run", "call", "check_call", "check_output", "communicate"}


def endless(text: str, may_start: bool = False) -> Iterator[int]:
    """Lines with calls that may wait for a program for ever."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            whose = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            limits = {keyword.arg for keyword in node.keywords}
            runs = node.func.attr in RUNS and (whose == "subprocess" or node.func.attr == "communicate")
            starts = whose == "subprocess" and node.func.attr == "Popen" and not may_start
            if (runs and not limits & {"timeout", None}) or starts:
                yield node.lineno


def test_every_program_that_a_test_starts_has_a_time_limit() -> None:
    files = [file for file in TESTS.rglob("*.py") if ".ruff_cache" not in file.parts]
    assert len(files) > 50
    found = [
        f"{file.relative_to(TESTS)}:{at}"
        for file in files
        for at in endless(file.read_text(), file.name == "running.py")
    ]
    assert not found, f"give them a timeout, or start them with tests/support/running.py: {found}"


def test_an_endless_call_is_found() -> None:
    calls = [
        "subprocess.run(['a'])",
        "subprocess.run(['a'], timeout=5)",
        "subprocess.Popen(['a'])",
        "child.communicate()",
        "child.communicate(timeout=5)",
    ]
    assert list(endless("\n".join(calls))) == [1, 3, 4]
