"""Two trainings that do not fit beside one another: by turns, and one after the other (benches/slices.py)."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .figures import Figure, Target, Unmeasurable, Wrong
from .plan import Sizes
from .serve_figures import python
from .workshop import ROOT, Workshop

PATIENCE = 900


def slices(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """Alone first, for the losses; then both orders of by-turns and one-after-the-other."""
    if not shop.software:
        raise Unmeasurable("two trainings that fill a GPU need host memory for both of them: start benches/slices.py by hand")
    interpreter = python()
    equal, throughput, serial, switches = [], [], [], []
    for _ in range(1 if sizes.repeats <= 2 else 3):
        with tempfile.TemporaryDirectory(prefix="sire-slices-") as folder:
            run = Run(shop, interpreter, Path(folder), sizes)
            alone, one_after_the_other = run.one_after_the_other()
            shared, by_turns = run.by_turns()
            run.together_fails()
        equal.append(float([each["losses"] for each in alone] == [each["losses"] for each in shared]))
        switches.append(float(sum(each["switches"] for each in shared)))
        serial.append(one_after_the_other)
        throughput.append(by_turns)
    notes = [f"two trainings of {sizes.sliced_steps} steps that each have 80 % of a device of {sizes.sliced_mib} MiB; {min(switches):.0f} switches at least"]
    notes.append("1: all losses are to the bit what each computes alone; side by side without slices one runs out of memory")
    ratios = [before / after for before, after in zip(serial, throughput, strict=True)]
    return [
        Figure("timeslice.losses_equal", "", equal, target=Target("value", at_least=1), notes=notes),
        Figure("timeslice.throughput_vs_serial", "s", throughput, serial, ratios=ratios, notes=["steps per second, as a share of one after the other"]),
    ]


class Run:
    """One repetition, on a device of its own."""

    def __init__(self, shop: Workshop, interpreter: Path, folder: Path, sizes: Sizes) -> None:
        environment = shop.environment(None, 0)
        environment.pop("LD_LIBRARY_PATH", None)
        environment |= {
            "SIRE_SIM_MEMORY": f"{sizes.sliced_mib}MiB",
            "PYTHONPATH": str(ROOT / "python-shim" / "src"),
            "SIRE_LIBRARY": str(shop.sire.library),
            "LD_PRELOAD": str(shop.sire.library),
            "SIRE_HOOK_MODE": "preload",
            "OMP_NUM_THREADS": "1",
            "TORCHTOOLS_LOCK_DIR": str(folder),
        }
        environment["SIRE_SIM_DIR"] = str(folder)
        self.environment, self.interpreter, self.sizes = environment, interpreter, sizes

    def start(self, what: str, seed: int) -> subprocess.Popen[str]:
        command = [str(self.interpreter), str(ROOT / "benches" / "slices.py"), what, str(seed), str(self.sizes.sliced_mib), str(self.sizes.sliced_steps)]
        return subprocess.Popen(command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ready(self, what: str, seed: int) -> subprocess.Popen[str]:
        """One that has everything imported, and begins at the next line."""
        job = self.start(what, seed)
        assert job.stdout is not None
        if job.stdout.readline() != "ready\n":
            raise Wrong(f"slices.py {what}: {job.communicate(timeout=PATIENCE)[1][-600:]}")
        return job

    def one_after_the_other(self) -> tuple[list[dict[str, Any]], float]:
        """What both say, and how long they train."""
        answers = [finish(self.ready("alone", seed), "alone") for seed in (1, 2)]
        return answers, sum(answer["ended"] - answer["began"] for answer in answers)

    def by_turns(self) -> tuple[list[dict[str, Any]], float]:
        jobs = [self.ready("sliced", seed) for seed in (1, 2)]
        for job in jobs:
            go(job)
        answers = [answer(job, "sliced") for job in jobs]
        return answers, max(each["ended"] for each in answers) - min(each["began"] for each in answers)

    def together_fails(self) -> None:
        """Without slices, the second runs out of memory while the first is there."""
        first = self.ready("crowd", 1)
        try:
            go(first)
            assert first.stdout is not None
            first.stdout.readline()
            second = self.ready("alone", 2)
            _, complaint = second.communicate("\n", timeout=PATIENCE)
            if second.returncode == 0 or "OutOfMemoryError" not in complaint:
                raise Wrong("two trainings that were to need 80 % of the device each did fit: nothing was shown")
        finally:
            first.kill()
            first.communicate()


def go(job: subprocess.Popen[str]) -> None:
    assert job.stdin is not None
    job.stdin.write("\n")
    job.stdin.flush()


def finish(job: subprocess.Popen[str], what: str) -> dict[str, Any]:
    go(job)
    return answer(job, what)


def answer(job: subprocess.Popen[str], what: str) -> dict[str, Any]:
    """What it says at its end."""
    try:
        said, complaint = job.communicate(timeout=PATIENCE)
    finally:
        job.kill()
    if job.returncode != 0:
        raise Wrong(f"slices.py {what}: {complaint.strip()[-600:]}")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found
