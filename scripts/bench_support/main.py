"""The command: which figures, in which order, and what becomes of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import (
    allocator_figures,
    clean_figures,
    disk_figures,
    hook_figures,
    layer_figures,
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures Sire against the machine's own limits and torch_memory_saver.")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--picture", type=Path, help="write the picture to this file (default: .sire/bench/bench.png)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="figures whose name starts so, such as pause.warm.32; may be repeated")
    parser.add_argument("--device", choices=["auto", "cuda", "software"], default="auto")
    parser.add_argument("--repeats", type=int, help="repetitions (default 7)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that everything works, and nothing else")
    parser.add_argument("--peer", type=Path, help="torch_memory_saver's preload library (default: found, or fetched with pip)")
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.add_argument("--disk-dir", type=Path, help="a folder on the disk to measure (default: .sire/bench)")
    parser.add_argument("--sabotage", choices=["skip-copy", "unmap-only"], help="run on a driver that lies: must fail")
    return parser.parse_args()


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

    def plan(self) -> list[tuple[tuple[str, ...], Measure]]:
        """Groups of figures that are measured together, by the starts of their names."""
        shop, sizes, offline = self.shop, self.sizes, self.options.offline

        def other() -> Place:
            return peer.find(self.options.peer, offline)

        return [
            (("pause.cold",), lambda: pause_figures.cold(shop, sizes)),
            (("pause.warm.32", "resume.warm.32"), lambda: pause_figures.warm(shop, sizes, 32)),
            (("pause.warm.1024", "resume.warm.1024"), lambda: pause_figures.warm(shop, sizes, 1024)),
            (("tms.default",), lambda: pause_figures.tms_default(shop, sizes, other())),
            (("tms.retained",), lambda: pause_figures.tms_retained(shop, sizes, other())),
            (("stall",), lambda: other_figures.stall(shop, sizes)),
            (("disk",), lambda: disk_figures.disk(shop, sizes, self.disk_folder())),
            (("pause.clean",), lambda: clean_figures.clean(shop, sizes)),
            (("pause.verified",), lambda: clean_figures.verified(shop, sizes)),
            (("shared_backup",), lambda: clean_figures.shared(shop, sizes, self.scratch)),
            (("file",), lambda: disk_figures.file(shop, sizes, self.disk_folder())),
            (("scale",), lambda: other_figures.scale(shop, sizes)),
            (("trace",), lambda: other_figures.trace(shop, sizes, self.scratch)),
            (("hook",), lambda: hook_figures.hooks(shop, sizes)),
            (("reserve", "ledger"), lambda: reserve_figures.reserve(sizes)),
            (("serve",), lambda: serve_figures.serve(shop, sizes, offline)),
            (("oversized",), lambda: layer_figures.oversized(shop, sizes, offline)),
            (("host",), lambda: layer_figures.overhead(shop, sizes)),
            (("slyce",), lambda: layer_figures.slices(shop, sizes)),
            (("commits", "memory"), lambda: layer_figures.patches(shop, sizes)),
            *self.allocator(),
            (("sim",), lambda: simulated_figures.simulated(sizes, self.scratch)),
        ]

    def allocator(self) -> list[tuple[tuple[str, ...], Measure]]:
        """Against PyTorch's own allocator, and time slices. Each is a dozen processes with PyTorch: too many to show that everything works."""
        if self.options.smoke and not self.options.only:
            return []
        shop, sizes = self.shop, self.sizes
        workloads = tuple(f"trace.{name}" for name in allocator_figures.WORKLOADS)
        return [
            (("alloc",), lambda: allocator_figures.calls(shop, sizes)),
            (("threads8",), lambda: allocator_figures.threads(shop, sizes)),
            (("blocks",), lambda: allocator_figures.blocks(shop, sizes)),
            (workloads, lambda: allocator_figures.traces(shop, sizes, self.scratch)),
            (("timeslice",), lambda: slice_figures.slices(shop, sizes)),
        ]

    def disk_folder(self) -> Path:
        """On a disk, in a folder of this run's own making."""
        folder: Path = self.options.disk_dir or peer.KEPT
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()

    def wanted(self, group: tuple[str, ...]) -> bool:
        only = self.options.only
        return not only or any(name.startswith(word) or word.startswith(f"{name}.") for name in group for word in only)

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
        self.look_around()
        self.warm_machine()
        if not self.options.only:
            self.machine()
        for group, measure in self.plan():
            if self.wanted(group):
                self.measure(" ".join(group), measure)

    def measure(self, name: str, measure: Measure) -> None:
        """One group. What goes wrong in it is told at the end, and gives no figure."""
        started = time.monotonic()
        try:
            found = [figure for figure in measure() if self.chosen(figure)]
        except Unmeasurable as error:
            self.missing[name] = str(error)
            return
        except Wrong as error:
            self.wrong.append(f"{name}: {error}")
            say(f"{name}: WRONG")
            return
        self.figures += found
        say(f"{name}: {', '.join(f'{f.name} {report.number(f.ratio if f.ratio else f.value)}' for f in found)} ({time.monotonic() - started:.0f} s)")

    def finish(self) -> int:
        """Table, JSON, picture; 1 if anything was wrong."""
        device = self.shop.described + ("; smoke sizes, which mean nothing" if self.options.smoke else "") + self.busy
        print(f"\n{device}\n\n{report.table(self.figures, self.missing)}")
        if self.options.json:
            self.options.json.write_text(json.dumps([figure.as_json(device) for figure in self.figures], indent=1) + "\n")
        self.draw(device)
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
            bench.run()
        except (Wrong, Unmeasurable) as error:
            print(f"scripts/bench: {error}", file=sys.stderr)
            return 1
        return bench.finish()
