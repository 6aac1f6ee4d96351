"""Two trainings that do not fit beside one another: by turns, and one after the other (benches/slices.py).

What is compared: the time in which the same two trainings, in the same two processes, are both done. One after the other each has the device for itself, and
the second begins when the first is done and its memory is free. By turns both begin at once. Both ways are taken in each repetition, one right after the
other and in changing order, after a round that is not measured (in it the second one runs out of memory beside the first).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from .figures import Figure, Target, Unmeasurable, Wrong, ways
from .plan import Sizes
from .serve_figures import python
from .workshop import ROOT, Workshop

# Seconds for one training, or the start of a process.
PATIENCE = 120
SEEDS = (1, 2)


def slices(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """Both ways, in each repetition."""
    if not shop.software:
        raise Unmeasurable("two trainings that fill a GPU need host memory for both of them: start benches/slices.py by hand")
    interpreter = python()
    equal, switches, costs, serial, shared = [], [], [], [], []
    with tempfile.TemporaryDirectory(prefix="sire-slices-") as folder, pair(shop, interpreter, Path(folder), sizes) as jobs:
        beside_one_another(jobs)
        for turns_first in ways(sizes.repeats):
            order = (by_turns, one_after_the_other) if turns_first else (one_after_the_other, by_turns)
            found = {way: way(jobs) for way in order}
            (alone, before), (sliced, after) = found[one_after_the_other], found[by_turns]
            equal.append([each["losses"] for each in alone] == [each["losses"] for each in sliced])
            switches.append(sum(each["switches"] for each in sliced))
            costs += [each["switch_seconds"] for each in sliced]
            serial.append(before)
            shared.append(after)
    notes = [
        f"two trainings of {sizes.sliced_steps} steps that each have 80 % of a device of {sizes.sliced_mib} MiB; {min(switches)} to {max(switches)} switches",
        "1: all losses are to the bit what each computes alone; side by side without slices one runs out of memory",
    ]
    throughput = [
        "throughput as a share of one after the other: the time for both trainings that way, by the time by turns",
        f"a pause and a resume take {median(costs) * 1000:.0f} ms together; a turn lasts {sizes.sliced_quantum:g} s: short, so that there are several",
    ]
    # A median would hide one repetition that differs.
    equality = [float(all(equal))] * len(equal)
    ratios = [before / after for before, after in zip(serial, shared, strict=True)]
    return [
        Figure("timeslice.losses_equal", "", equality, target=Target("value", at_least=1), notes=notes),
        Figure("timeslice.throughput_vs_serial", "s", shared, serial, ratios=ratios, notes=throughput),
    ]


class Job:
    """A process that trains when it is told to."""

    def __init__(self, process: subprocess.Popen[str], complaints: Path) -> None:
        self.process, self.complaints = process, complaints

    def line(self) -> str:
        """The next that it says; one that says nothing is ended."""
        assert self.process.stdout is not None
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            said = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not said:
            raise Wrong(f"slices.py: {self.complaints.read_text().strip()[-600:]}")
        return said

    def tell(self, what: str, seed: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {seed}\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.line())
        return answer

    def ask(self, what: str, seed: int) -> dict[str, Any]:
        self.tell(what, seed)
        return self.hear()


Both = tuple[Job, ...]
Found = tuple[list[dict[str, Any]], float]


@contextlib.contextmanager
def pair(shop: Workshop, interpreter: Path, folder: Path, sizes: Sizes) -> Iterator[Both]:
    """Two processes that have everything imported, on a device of their own."""
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
        "SIRE_SIM_DIR": str(folder),
    }
    sizes_told = map(str, (sizes.sliced_mib, sizes.sliced_steps, sizes.sliced_quantum))
    command = [str(interpreter), str(ROOT / "benches" / "slices.py"), *sizes_told]
    jobs: list[Job] = []
    with contextlib.ExitStack() as stack:
        for seed in SEEDS:
            complaints = folder / f"{seed}.log"
            stream = stack.enter_context(complaints.open("w"))
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True)
            # Last in, first out: it is dead when its pipes are closed.
            stack.enter_context(process)
            stack.callback(process.kill)
            jobs.append(Job(process, complaints))
        if any(job.line() != "ready\n" for job in jobs):
            raise Wrong("slices.py does not say that it is ready")
        yield tuple(jobs)


def one_after_the_other(jobs: Both) -> Found:
    """What both say, and how long they train."""
    answers = [trained(job.ask("alone", seed)) for job, seed in zip(jobs, SEEDS, strict=True)]
    return answers, sum(answer["ended"] - answer["began"] for answer in answers)


def by_turns(jobs: Both) -> Found:
    """The same, from the first one's beginning to the last one's end."""
    for job, seed in zip(jobs, SEEDS, strict=True):
        job.tell("turns", seed)
    answers = [trained(job.hear()) for job in jobs]
    if not all(answer["switches"] for answer in answers):
        raise Wrong(f"a training never made way, so nothing was shown: {[answer['switches'] for answer in answers]} switches")
    return answers, max(each["ended"] for each in answers) - min(each["began"] for each in answers)


def beside_one_another(jobs: Both) -> None:
    """Without slices, the second runs out of memory while the first is there. Both have warmed up then."""
    first, second = jobs
    for one, other in ((first, second), (second, first)):
        trained(one.ask("crowd", SEEDS[0]))
        if "out_of_memory" not in other.ask("alone", SEEDS[1]):
            raise Wrong("two trainings that were to need 80 % of the device each did fit: nothing was shown")
        # It gives its memory back.
        one.ask("rest", 0)


def trained(answer: dict[str, Any]) -> dict[str, Any]:
    if "out_of_memory" in answer:
        raise Wrong("a training that was to fit ran out of memory")
    return answer
