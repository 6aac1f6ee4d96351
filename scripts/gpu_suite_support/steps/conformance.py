"""Step `conformance`: the conformance suite of the Driver trait, prebuilt by `scripts/gpu-bundle`, against this
machine's driver.
"""

from __future__ import annotations

import re
from pathlib import Path

from .. import child
from ..context import Context
from ..report import Report

NAMES = ("conformance", "cuda-conformance")


def _built(context: Context) -> Path | None:
    """The binary where a build of this checkout left it: another crate's test has the same name, so each is asked."""
    found = [path for path in (context.library.parent / "deps").glob("conformance-*") if not path.suffix]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        listed = child.run([str(path), "--list"], env=context.env(), timeout=20)
        if listed.ok and "the_real_driver_keeps_the_bargain" in listed.output:
            return path
    return None


def run(context: Context, report: Report) -> None:
    """One check per test of the binary, and one for the binary."""
    binary = next((found for name in NAMES if (found := context.find(name)) is not None), None) or _built(context)
    if binary is None:
        report.check(
            "conformance",
            False,
            "no conformance binary: make a bundle with scripts/gpu-bundle and give it with --bundle",
        )
        return
    # Named, because the suite passes without a driver where none is named.
    env = context.env(SIRE_LIBCUDA=context.driver)
    outcome = child.run([str(binary), "--test-threads=1"], env=env, timeout=context.left(90))
    tests = re.findall(r"^test (\S+) ?.*?\.\.\. (ok|FAILED|ignored)", outcome.output, re.MULTILINE | re.DOTALL)
    for name, result in tests:
        if result != "ignored":
            report.check(f"conformance.{name}", result == "ok", "" if result == "ok" else outcome.tail(40))
    report.check("conformance", outcome.ok and bool(tests), outcome.tail(), outcome.seconds)
