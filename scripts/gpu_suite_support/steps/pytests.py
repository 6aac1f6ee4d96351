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
    for mode in ("preload", "torch"):
        named = {"SIRE_TEST_MODE": mode, "SIRE_HOOK_MODE": mode}
        for file in sorted((folder / "device").glob("test_*.py")):
            name = f"python.{mode}.{file.stem}"
            pytest(context, report, name, file, seconds=seconds, named=named, preload=mode == "preload")
    pytest(context, report, "python", folder, seconds=seconds, ignore=[folder / "device", folder / STARTER])


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
) -> None:
    """One run of pytest over a folder or file, with the environment variables `named`."""
    results = context.scratch / f"{name}.xml"
    command = [context.python, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--junitxml={results}", *(f"--ignore={path}" for path in ignore)]
    env = context.env(preload=preload) | (named or {})
    outcome = child.run(command, env=env, timeout=context.left(seconds), cwd=ROOT)
    counted = _take(report, name, results) if results.exists() else 0
    # 0: all passed; 1: some failed, which the single checks say already.
    report.check(name, outcome.status in (0, 1) and counted > 0, outcome.tail(25), outcome.seconds)


def _take(report: Report, name: str, results: Path) -> int:
    """Adds a check for every test case that was not skipped; returns how many."""
    counted = 0
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        if case.find("skipped") is not None:
            continue
        bad = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        detail = "" if bad is None else f"{bad.get('message') or ''}\n{bad.text or ''}"
        file = (case.get("classname") or "").rsplit(".", 1)[-1]
        label = ".".join([name, *([] if name.endswith(file) else [file]), case.get("name") or ""])
        report.check(label, bad is None, detail, float(case.get("time") or 0))
        counted += 1
    return counted
