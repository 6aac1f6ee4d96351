"""The command: which figures, in which order, and what becomes of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import (
    allocator_figures,
    clean_figures,
    disk_figures,
    hook_figures,
    layer_figures,
    limits,
    other_figures,
    pause_figures,
    peer,
    picture,
    report,
    reserve_figures,
    serve_figures,
    simulated_figures,
    slice_figures,
)
from .child import call
from .figures import GIB, Figure, Unmeasurable, Wrong
from .plan import SMOKE, Sizes
from .workshop import Place, Workshop, has_gpu, read, real_runtime

Measure = Callable[[], list[Figure]]
# A whole run takes no longer: what would begin later is left out, and said to be.
MINUTES = 20.0


@dataclass(frozen=True)
class Group:
    """Figures that are measured together, by the starts of their names; the seconds that they may take."""

    names: tuple[str, ...]
    seconds: float
    measure: Measure

    def __str__(self) -> str:
        return " ".join(self.names)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures Sire against the machine's own limits and torch_memory_saver.")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--picture", type=Path, help="write the picture to this file (default: .sire/bench/bench.png)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="figures whose name starts so, such as pause.warm.32; may be repeated")
    parser.add_argument("--device", choices=["auto", "cuda", "software"], default="auto")
    parser.add_argument("--repeats", type=int, help="repetitions (default 7)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"begin no figure later than this, and end it then (default {MINUTES:g})")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that everything works, and nothing else")
    parser.add_argument("--peer", type=Path, help="torch_memory_saver's preload library (default: found, or fetched with pip)")
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.add_argument("--disk-dir", type=Path, help="a folder on the disk to measure (default: .sire/bench)")
    parser.add_argument("--sabotage", choices=["skip-copy", "unmap-only"], help="run on a driver that lies: must fail")
    return parser.parse_args()


def simulated_names() -> tuple[str, ...]:
    """The starts of the figures that benches/simulated gives."""
    return tuple(f"sim.{profile}" for profile in simulated_figures.profiles())


def is_of(word: str, group: tuple[str, ...]) -> bool:
    """Whether `--only word` means figures of the group."""
    return any(name.startswith(word) or word.startswith(f"{name}.") for name in group)


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, shop: Workshop, scratch: Path) -> None:
        self.options, self.shop, self.scratch = options, shop, scratch
        base = SMOKE if options.smoke else Sizes()
        self.sizes = base if not options.repeats else Sizes(**{**base.__dict__, "repeats": options.repeats})
        self.figures: list[Figure] = []
        self.missing: dict[str, str] = {}
        self.wrong: list[str] = []
        self.busy = ""
        self.took: dict[str, float] = {}
        self.started = time.monotonic()

    def plan(self) -> list[Group]:
        """Everything, the most important first. A group's limit is about three times what it takes on two cores with nothing beside it."""
        shop, sizes, offline = self.shop, self.sizes, self.options.offline

        def other() -> Place:
            return peer.find(self.options.peer, offline)

        return [
            Group(("pause.cold",), 180, lambda: pause_figures.cold(shop, sizes)),
            Group(("pause.warm.32", "resume.warm.32"), 100, lambda: pause_figures.warm(shop, sizes, 32)),
            Group(("pause.warm.1024", "resume.warm.1024"), 100, lambda: pause_figures.warm(shop, sizes, 1024)),
            Group(("tms.default",), 240, lambda: pause_figures.tms_default(shop, sizes, other())),
            Group(("tms.retained",), 240, lambda: pause_figures.tms_retained(shop, sizes, other())),
            Group(("pause.clean",), 60, lambda: clean_figures.clean(shop, sizes)),
            Group(("pause.verified",), 60, lambda: clean_figures.verified(shop, sizes)),
            Group(("stall",), 180, lambda: other_figures.stall(shop, sizes)),
            Group(("disk",), 180, lambda: disk_figures.disk(shop, sizes, self.disk_folder())),
            Group(("file",), 120, lambda: disk_figures.file(shop, sizes, self.disk_folder())),
            Group(("shared_backup",), 120, lambda: clean_figures.shared(shop, sizes, self.scratch)),
            Group(simulated_names(), 200, lambda: simulated_figures.simulated(sizes, self.scratch)),
            Group(("sim.tms",), 150, lambda: pause_figures.tms_simulated(shop, sizes, other())),
            Group(("scale",), 180, lambda: other_figures.scale(shop, sizes)),
            Group(("trace.pair_ns",), 60, lambda: other_figures.trace(shop, sizes, self.scratch)),
            Group(("hook",), 60, lambda: hook_figures.hooks(shop, sizes)),
            Group(("serve",), 180, lambda: serve_figures.serve(shop, sizes, offline)),
            Group(("oversized",), 100, lambda: layer_figures.oversized(shop, sizes, offline)),
            Group(("host",), 120, lambda: layer_figures.overhead(shop, sizes)),
            Group(("slyce",), 60, lambda: layer_figures.slices(shop, sizes)),
            Group(("commits", "memory"), 60, lambda: layer_figures.patches(shop, sizes)),
            *self.allocator(),
            Group(("reserve", "ledger"), 180, lambda: reserve_figures.reserve(sizes)),
        ]

    def allocator(self) -> list[Group]:
        """Against PyTorch's own allocator, and time slices. Each is several processes with PyTorch: too many to show that everything works."""
        if self.options.smoke and not self.options.only:
            return []
        shop, sizes = self.shop, self.sizes
        # Only those that are wanted are recorded, so that one of them alone takes seconds.
        names = [name for name in allocator_figures.WORKLOADS if self.wants(f"trace.{name}")]
        workloads = tuple(f"trace.{name}" for name in names or allocator_figures.WORKLOADS)
        return [
            Group(("alloc",), 120, lambda: allocator_figures.calls(shop, sizes)),
            Group(("threads8",), 60, lambda: allocator_figures.threads(shop, sizes)),
            Group(("blocks",), 180, lambda: allocator_figures.blocks(shop, sizes)),
            Group(workloads, 180, lambda: allocator_figures.traces(shop, sizes, self.scratch, names)),
            Group(("timeslice",), 240, lambda: slice_figures.slices(shop, sizes)),
        ]

    def build(self) -> None:
        """What is built once is not part of any figure's time."""
        if self.wants("sim"):
            try:
                simulated_figures.program()
            except (Wrong, Unmeasurable):
                return  # Its figure says so.
        if self.wants("reserve") or self.wants("ledger"):
            reserve_figures.build()

    def wants(self, name: str) -> bool:
        return self.wanted((name,))

    def disk_folder(self) -> Path:
        """On a disk, in a folder of this run's own making."""
        folder: Path = self.options.disk_dir or peer.KEPT
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()

    def wanted(self, group: tuple[str, ...]) -> bool:
        return not self.options.only or any(is_of(word, group) for word in self.options.only)

    def chosen_groups(self) -> list[Group]:
        """What is wanted of the plan; a word that means nothing in it is told before anything is measured."""
        plan = self.plan()
        for word in self.options.only:
            if not any(is_of(word, group.names) for group in plan):
                names = " ".join(name for group in plan for name in group.names)
                raise Wrong(f"--only {word}: no figure's name starts so; they start with one of: {names}")
        return [group for group in plan if self.wanted(group.names)]

    def chosen(self, figure: Figure) -> bool:
        return not self.options.only or any(figure.name.startswith(word) for word in self.options.only)

    def warm_machine(self) -> None:
        """Touches as much memory as the run will use: the first touch in a virtual machine is many times slower than any later one."""
        if self.options.smoke:
            return
        available = int(read("/proc/meminfo").partition("MemAvailable:")[2].split()[0]) * 1024
        amount = min(5 * self.sizes.amount, int(available * 0.8))
        answer = call(self.shop, "raw", "warm", str(amount))[0]
        say(f"warmed {amount / GIB:.1f} GiB of the machine's memory in {answer['touch']:.1f} s")

    def look_around(self) -> None:
        """Other programs take their share of every figure; the reader should know."""
        load = os.getloadavg()[0]
        if load > 0.5:
            self.busy = f"; BUSY: load {load:.1f} before the run"
            say(f"other programs are running (load {load:.1f} on {os.cpu_count()} CPUs); figures will be worth little")

    def machine(self) -> None:
        """What a plain memcpy does here, for the reader."""
        amount = min(self.sizes.amount, GIB) // 2
        answers = [call(self.shop, "raw", "copy", str(amount))[0] for _ in range(3)]
        huge = max(answer["huge"] for answer in answers)
        figure = Figure("machine.memcpy", "GiB/s", [amount / GIB / answer["copy"] for answer in answers])
        figure.notes.append(f"one thread, huge pages for {huge:.0%}; huge pages {read('/sys/kernel/mm/transparent_hugepage/enabled')}")
        self.figures.append(figure)

    def run(self) -> None:
        """All that is wanted, one after the other; what was found so far is on the disk after each."""
        groups = self.chosen_groups()
        self.look_around()
        self.build()
        self.warm_machine()
        self.started = time.monotonic()
        if not self.options.only:
            self.machine()
        for number, group in enumerate(groups, 1):
            left = self.options.minutes * 60 - (time.monotonic() - self.started)
            if left <= 0:
                self.missing[str(group)] = f"the run's {self.options.minutes:g} minutes were over; --only {group.names[0]} measures it alone"
                continue
            say(f"[{number}/{len(groups)}] {group} ...")
            self.measure(group, min(left, group.seconds))
            self.write()

    def measure(self, group: Group, seconds: float) -> None:
        """One group. What goes wrong in it is told at the end, and gives no figure; the others go on."""
        name, started = str(group), time.monotonic()
        found: list[Figure] = []
        try:
            with limits.at_most(seconds):
                measured = group.measure()
            found = [figure for figure in measured if self.chosen(figure)]
            self.miss(group, measured)
            told = ", ".join(f"{f.name} {report.number(f.ratio if f.ratio else f.value)}" for f in found)
        except Unmeasurable as error:
            self.missing[name] = told = str(error)
        except limits.OutOfTime:
            self.missing[name] = told = f"it did not end within {seconds:.0f} s"
        except Wrong as error:
            self.wrong.append(f"{name}: {error}")
            told = "WRONG"
        except Exception as error:
            self.wrong.append(f"{name}: it failed: {type(error).__name__}: {error}")
            told = "FAILED"
        self.figures += found
        self.took[name] = time.monotonic() - started
        say(f"{name}: {told} ({self.took[name]:.0f} s, {(time.monotonic() - self.started) / 60:.1f} min in all)")

    def miss(self, group: Group, measured: list[Figure]) -> None:
        """Tells of words that mean the group, and none of its figures."""
        names = [figure.name for figure in measured]
        for word in self.options.only:
            if is_of(word, group.names) and not any(name.startswith(word) for name in names):
                self.missing[word] = f"no figure's name starts so; there are: {' '.join(names)}"

    def described(self) -> str:
        return self.shop.described + ("; smoke sizes, which mean nothing" if self.options.smoke else "") + self.busy

    def write(self) -> None:
        """The figures so far, whole or not at all."""
        if self.options.json:
            target: Path = self.options.json
            beside = target.with_name(f".{target.name}.{os.getpid()}")
            beside.write_text(json.dumps([figure.as_json(self.described()) for figure in self.figures], indent=1) + "\n")
            beside.replace(target)

    def finish(self) -> int:
        """Table, JSON, picture; 1 if anything was wrong."""
        device = self.described()
        print(f"\n{device}\n\n{report.table(self.figures, self.missing)}")
        self.write()
        self.draw(device)
        slowest = sorted(self.took.items(), key=lambda item: -item[1])[:5]
        say(f"{(time.monotonic() - self.started) / 60:.1f} min; longest: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in slowest)}")
        for text in self.wrong:
            print(f"WRONG: {text}", file=sys.stderr)
        return 1 if self.wrong or not self.figures else 0

    def draw(self, device: str) -> None:
        target: Path = self.options.picture or peer.KEPT / "bench.png"
        if not any(figure.ratios for figure in self.figures):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.draw(self.figures, device, target)
        except ImportError:
            say("no picture: matplotlib is not installed in this Python")
        else:
            print(f"\npicture: {target}")


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Everything."""
    options = arguments()
    software = options.device == "software" or (options.device == "auto" and not (has_gpu() and real_runtime()))
    with tempfile.TemporaryDirectory(prefix="sire-bench-") as folder:
        try:
            bench = Bench(options, Workshop(Path(folder), software, options.sabotage), Path(folder))
            bench.chosen_groups()
        except (Wrong, Unmeasurable) as error:
            print(f"scripts/bench: {error}", file=sys.stderr)
            return 1
        limits.watch()
        try:
            bench.run()
        except (Wrong, Unmeasurable) as error:
            bench.wrong.append(str(error))
        except limits.Ended:
            bench.missing["the rest"] = "the run was ended from outside"
            bench.finish()
            return 130
        return bench.finish()
