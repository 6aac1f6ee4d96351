"""Tests of the tests: whoever skips one with PyTorch, or of the command, says why in a list, which can be counted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
DEVICE = TESTS / "python" / "device"
# Of each folder of tests: its list, and the kinds of reasons in it.
LISTS = {DEVICE / "other_skips.txt": {"machine", "elsewhere"}, TESTS / "cli" / "skips.txt": {"machine", "build"}}
REASONS = DEVICE / "other_skips.txt"
# The marker that conftest.py makes of the lists by name.
BY_NAME = ("conftest.py", "*")

each_list = pytest.mark.parametrize("file", LISTS, ids=lambda file: file.parent.name)


def listed(file: Path) -> dict[str, str]:
    """Reason to kind."""
    lines = [line for line in file.read_text().splitlines() if line and line[0] != "#"]
    return {reason: kind for kind, _, reason in (line.partition(":  ") for line in lines)}


def pattern(node: ast.expr) -> str:
    """A text in the source, with `*` for what is only known at run time."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return "*"


def skips(text: str) -> Iterator[str]:
    """The reason of every call that skips a test, in whichever way pytest knows."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            reasons = [keyword.value for keyword in node.keywords if keyword.arg in ("reason", "msg")]
            if re.search(r"\b(skip|skipif|skipTest|SkipTest|xfail)$", name):
                given = reasons or node.args[-1:]
                yield pattern(given[0]) if given else ""
            elif name.endswith("importorskip"):
                yield pattern(reasons[0]) if reasons else "not installed: *"


def given(folder: Path) -> list[tuple[str, str]]:
    files = sorted(folder.glob("*.py"))
    return [(file.name, reason) for file in files for reason in skips(file.read_text())]


@each_list
def test_every_skip_gives_a_listed_reason(file: Path) -> None:
    found = given(file.parent)
    assert len(found) > 15
    unknown = [each for each in found if each[1] not in listed(file) and each != BY_NAME]
    names = "put tests that PyTorch forbids in a configuration into its list, by name"
    assert not unknown, f"{names}, or the reason into {file.name}: {unknown}"


@each_list
def test_every_listed_reason_is_given(file: Path) -> None:
    stale = set(listed(file)) - {reason for _, reason in given(file.parent)}
    assert not stale, f"no test gives {stale}"
    assert set(listed(file).values()) == LISTS[file]


@pytest.mark.parametrize("file", sorted(DEVICE.glob("*_skips.txt")), ids=lambda file: file.name)
def test_the_lists_by_name_name_tests_once(file: Path) -> None:
    if file == REASONS:
        return
    names = [line.partition(":  ")[0] for line in file.read_text().splitlines() if line and line[0] != "#"]
    assert len(names) == len(set(names))
    for name in names:
        source, _, test = name.partition("::")
        assert re.search(rf"^def {test}\(", (DEVICE / source).read_text(), flags=re.MULTILINE), name


def test_a_skip_is_found() -> None:
    ways = [
        "pytest.skip('a')",
        "pytest.skip(reason='b')",
        "mark = pytest.mark.skipif(True, reason=f'c {x} d')",
        "pytest.importorskip('e')",
        "pytest.mark.xfail(reason='f')",
        "skips('no')",
    ]
    assert list(skips("\n".join(ways))) == ["a", "b", "c * d", "not installed: *", "f"]
