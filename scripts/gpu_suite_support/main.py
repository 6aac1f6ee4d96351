"""The command line of `scripts/gpu-suite`: finds the parts, runs the steps within the budget, prints a summary."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .context import ROOT, Context, gpu_is_usable, stand_in_directory
from .report import Report
from .steps import STEPS


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="scripts/gpu-suite", description="Everything of Sire that applies to this machine's device, as one JSON.")
    parser.add_argument("--library", type=Path, help="libsire_alloc.so (default: the bundle's, else target/release)")
    parser.add_argument("--bundle", type=Path, help="folder that scripts/gpu-bundle made")
    parser.add_argument("--out", type=Path, default=Path("gpu-suite.json"), help="result file (default: gpu-suite.json)")
    parser.add_argument("--python", default=sys.executable, help="Python that has PyTorch (default: this one)")
    parser.add_argument("--device", choices=("auto", "cuda", "software"), default="auto")
    parser.add_argument("--only", default="", help=f"steps, with commas: {', '.join(STEPS)}")
    parser.add_argument("--budget", type=float, default=590, help="seconds for everything (default: 590)")
    return parser.parse_args(argv)


def make_context(options: argparse.Namespace, scratch: Path) -> Context:
    """Finds the parts, or ends with a sentence that says which is missing."""
    device = options.device
    if device == "auto":
        device = "cuda" if gpu_is_usable() else "software"
    bundle = options.bundle.resolve() if options.bundle else None
    places = [bundle] if bundle else []
    library = options.library or next(
        (place / "libsire_alloc.so" for place in places if (place / "libsire_alloc.so").exists()),
        ROOT / "target" / "release" / "libsire_alloc.so",
    )
    context = Context(device, library.resolve(), bundle, options.python, scratch, time.monotonic() + options.budget)
    if context.software:
        context.stand_in = stand_in_directory(options.python, bundle)
        if context.stand_in is None:
            raise SystemExit(
                f"scripts/gpu-suite: {options.python} is not a software environment (its site-packages hold no "
                "nvidia/*/lib/libcuda.so.1): make one with `sire software-env DIR` and give --python DIR/bin/python"
            )
        context.driver = str(context.stand_in / "libcuda.so.1")
        runtimes = (context.stand_in / f"libcudart.so.{major}" for major in (13, 12))
        context.runtime = str(next(runtime for runtime in runtimes if runtime.exists()))
    return context


def chosen(only: str) -> list[str]:
    """The steps to run."""
    names = [name for name in only.split(",") if name] or list(STEPS)
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise SystemExit(f"scripts/gpu-suite: no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Runs the suite; 0 if every check passed."""
    options = arguments(argv)
    names = chosen(options.only)
    with tempfile.TemporaryDirectory(prefix="sire-suite-") as scratch:
        context = make_context(options, Path(scratch))
        report = Report(options.out.resolve(), context.device)
        report.shorten = {scratch: "SCRATCH", str(ROOT): ".", str(Path.home()): "~"}
        if bundle := context.bundle:
            report.shorten = {str(bundle): "BUNDLE"} | report.shorten
        print(f"gpu-suite: {context.device} device, library {context.library}, writing {options.out}", flush=True)
        for name in names:
            _run(name, context, report)
        report.finished = True
        report.write()
    counts = f"{len(report.answers)} answers, {len(report.figures)} figures"
    print(f"\n{len(report.checks) - len(report.failed)} of {len(report.checks)} checks passed, {counts}")
    for name in report.failed:
        print(f"  failed: {name}")
    return 1 if report.failed else 0


def _run(name: str, context: Context, report: Report) -> None:
    """One step; what goes wrong in the suite itself is a failed check, not the end."""
    start, before = time.monotonic(), len(report.checks)
    if context.left(1) <= 0:
        report.check(name, False, "not run: no time was left (--budget)")
    else:
        try:
            STEPS[name](context, report)
        except Exception:  # a mistake in one step must not lose the others
            report.check(name, False, traceback.format_exc())
    seconds = time.monotonic() - start
    failed = sum(not check["passed"] for check in report.checks[before:])
    report.steps.append({"name": name, "seconds": round(seconds, 1), "checks": len(report.checks) - before, "failed": failed})
    report.write()
    print(f"{name:14} {seconds:6.1f} s  {len(report.checks) - before:4} checks  {failed:3} failed", flush=True)
