#!/usr/bin/env python3
"""Runs the benchmark programs and prints one JSON object per result.

    benches/run.py [--json FILE] [--quick] [hooks] [stall]

Without a GPU they run on the software device, and every result says so in `device`: its times are this machine's, by the wall clock,
not a GPU's, nor those of a model (`"simulated"` is for those); driver calls per operation are exact everywhere. `SIRE_ALLOC_SO` and
`SIRE_SIM_SO` name the libraries; else the release build of this checkout is taken. `SIRE_BENCH_CUDA=DIR` names
a folder with a real libcudart.so.13 (or .12) to run on a GPU instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COUNTING_RUNTIME = ROOT / "tests" / "preload" / "fixtures" / "runtime.c"
Result = dict[str, object]


def library(variable: str, name: str) -> Path:
    """The library that `variable` names, else the release build."""
    path = Path(os.environ.get(variable) or Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / name)
    if not path.is_file():
        sys.exit(f"{path} does not exist; build it with `cargo build --release`, or name it in {variable}")
    return path.resolve()


def compile_c(output: Path, source: Path, *arguments: str) -> Path:
    """Compiles one program or library."""
    command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-pthread", str(source), "-o", str(output), *arguments]
    subprocess.run(command, check=True)
    return output


class Bench:
    """The programs, built, and the places to run them on."""

    def __init__(self, folder: Path) -> None:
        self.sire = library("SIRE_ALLOC_SO", "libsire_alloc.so")
        self.real = os.environ.get("SIRE_BENCH_CUDA")
        # A runtime that only counts and calls malloc: what a hook adds is seen best on top of something cheap.
        self.null = folder / "null"
        self.null.mkdir()
        runtime = self.null / "libcudart.so.13"
        compile_c(runtime, COUNTING_RUNTIME, "-shared", "-fPIC", "-Wl,-soname,libcudart.so.13")
        self.device = Path(self.real) if self.real else self._software(folder / "device")
        link = ["-Wl,--no-as-needed", str(runtime), "-ldl"]
        self.hooks = compile_c(folder / "hooks", HERE / "hooks.c", *link)
        self.stall = compile_c(folder / "stall", HERE / "stall.c", *link)

    @staticmethod
    def _software(folder: Path) -> Path:
        sim = library("SIRE_SIM_SO", "libsire_sim_cuda.so")
        folder.mkdir()
        for name in ("libcudart.so.13", "libcudart.so.12", "libcuda.so.1"):
            (folder / name).symlink_to(sim)
        return folder

    def run(self, program: Path, *arguments: str, folder: Path, preload: bool, **variables: str) -> list[Result]:
        """The results of one run."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SIRE_", "TMS_"))}
        environment.update({"LD_LIBRARY_PATH": str(folder), "SIRE_LOG": "off", "SIRE_SIM_POISON": "off", **variables})
        if preload:
            environment["LD_PRELOAD"] = str(self.sire)
        done = subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{program.name} {' '.join(arguments)} failed ({done.returncode}):\n{done.stderr}")
        device = "none (counting runtime)" if folder == self.null else "GPU" if self.real else "software"
        machine = f"{device}; {platform.machine()}, {os.cpu_count()} CPUs"
        return [json.loads(line) | {"simulated": False, "device": machine} for line in done.stdout.splitlines()]

    def hook_costs(self, quick: bool) -> list[Result]:
        """Pass-through on a runtime that costs nothing, and own allocations on the device."""
        results: list[Result] = []
        operations = "2000" if quick else "100000"
        results += self.run(self.hooks, "pass", "0", operations, "512", "plain runtime", folder=self.null, preload=False)
        results += self.run(self.hooks, "pass", "0", operations, "512", "pass-through", folder=self.null, preload=True)
        for live in ("1000", "1000000") if quick else ("1000", "10000", "100000", "1000000"):
            for mode, count, size, label in (
                ("pass", operations, "512", "pass-through beside own"),
                ("own", operations, "512", "own, 512 bytes"),
                ("own", "200" if quick else "1000", str(2 << 20), "own, 2 MiB"),
            ):
                results += self.run(self.hooks, mode, live, count, size, label, folder=self.device, preload=True, SIRE_SIM_MEMORY="4GiB")
        results += self.run(self.hooks, "pass", "1000", operations, "512", "plain device", folder=self.device, preload=False)
        return results

    def stalls(self, quick: bool) -> list[Result]:
        """The open loop."""
        mebibytes = 256 if quick else 2048
        variables = {"SIRE_SIM_MEMORY": f"{mebibytes + 256}MiB", "SIRE_SIM_TIMING": "1"}
        return self.run(self.stall, str(mebibytes), folder=self.device, preload=True, **variables)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=["hooks", "stall", []], help="all if none is named")
    parser.add_argument("--json", type=Path, help="write the results as a list to this file too")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a check that everything runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sire-bench-") as folder:
        bench = Bench(Path(folder))
        results: list[Result] = []
        parts = {"hooks": bench.hook_costs, "stall": bench.stalls}
        for name in options.which or parts:
            for result in parts[name](options.quick):
                print(json.dumps(result), flush=True)
                results.append(result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
