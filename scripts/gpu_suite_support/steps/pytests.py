"""Step `python`: the tests of `tests/python`; those in `device` once per hook mode. Each test case becomes a check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .. import child
from ..context import ROOT, Context
from ..report import Report

# Starts the tests in `device` itself, which is done here.
STARTER = "test_device_modes.py"


def run(context: Context, report: Report) -> None:
    """Runs pytest over what needs a device, in each mode, and then over the rest."""
    folder = ROOT / "tests" / "python"
    if not folder.is_dir():
        report.check("python", False, "tests/python is not there")
        return
    # The software device computes on the CPU.
    seconds = 180 if context.software else 60
    # Every file in a process of its own, as these tests want it: what one leaves in PyTorch's pools stays there.
    files = sorted((folder / "device").glob("test_*.py"))
    ran = dict.fromkeys(files, 0)
    for mode in ("preload", "torch"):
        named = {"SIRE_TEST_MODE": mode, "SIRE_HOOK_MODE": mode}
        for file in files:
            name = f"python.{mode}.{file.stem}"
            ran[file] += pytest(context, report, name, file, seconds=seconds, named=named, preload=mode == "preload")
    for file in files:
        # A file may leave one mode to the other, but not both.
        report.check(f"python.{file.stem}.ran", ran[file] > 0, "all of its tests were skipped, in every mode")
    counted = pytest(context, report, "python", folder, seconds=seconds, ignore=[folder / "device", folder / STARTER])
    report.check("python.ran", counted > 0, "all tests without a device were skipped")


def pytest(
    context: Context,
    report: Report,
    name: str,
    folder: Path,
    *,
    seconds: float,
    named: dict[str, str] | None = None,
    preload: bool = False,
    ignore: Sequence[Path] = (),
) -> int:
    """One run of pytest over a folder or file, with the environment variables `named`; returns how many test cases were not skipped."""
    results = context.scratch / f"{name}.xml"
    command = [context.python, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--junitxml={results}", *(f"--ignore={path}" for path in ignore)]
    env = context.env(preload=preload) | (named or {})
    outcome = child.run(command, env=env, timeout=context.left(seconds), cwd=ROOT)
    cases, counted = _take(report, name, results) if results.exists() else (0, 0)
    # 0: all passed; 1: some failed, which the single checks say already.
    report.check(name, outcome.status in (0, 1) and cases > 0, outcome.tail(25), outcome.seconds)
    return counted


def _take(report: Report, name: str, results: Path) -> tuple[int, int]:
    """Adds a check for every test case that was not skipped; returns how many there are, and how many these were."""
    cases = counted = 0
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        cases += 1
        if case.find("skipped") is not None:
            continue
        bad = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        detail = "" if bad is None else f"{bad.get('message') or ''}\n{bad.text or ''}"
        file = (case.get("classname") or "").rsplit(".", 1)[-1]
        label = ".".join([name, *([] if name.endswith(file) else [file]), case.get("name") or ""])
        report.check(label, bad is None, detail, float(case.get("time") or 0))
        counted += 1
    return cases, counted
