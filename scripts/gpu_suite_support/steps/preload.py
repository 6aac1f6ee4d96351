"""Step `preload`: the tests of `tests/preload`, whose C programs hear the library through LD_PRELOAD alone.

They compile C programs and bring their own small runtimes, or the software device, so they say how the library behaves
beside this machine's loader and libc, and nothing of its GPU.
"""

from __future__ import annotations

from ..context import ROOT, Context
from ..report import Report
from .pytests import pytest


def run(context: Context, report: Report) -> None:
    """Runs pytest with the libraries named."""
    folder = ROOT / "tests" / "preload"
    if not any(folder.glob("test_*.py")):
        report.check("preload", False, "tests/preload is not there")
        return
    named = {"SIRE_ALLOC_SO": str(context.library)}
    stand_in = context.find("libsire_sim_cuda.so")
    if stand_in is None and context.stand_in is not None:
        stand_in = context.stand_in / "libcuda.so.1"
    if stand_in is not None:
        named["SIRE_SIM_SO"] = str(stand_in.resolve())
    pytest(context, report, "preload", folder, seconds=450 if context.software else 180, named=named)
