"""The demo, told in order. Started by `scripts/demo` with everything built and installed; imports no torch itself.

Each scene is a process of its own (`scenario.py`). The demo succeeds only if every scene showed what it is meant to
show; with `--sabotage` one thing is broken on purpose, and the demo must therefore fail.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import figures

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MIB = 1 << 20
SABOTAGES = ("unmap-only", "skip-copy", "move-address")


@dataclass
class Show:
    """What the scenes need, and what they have shown so far."""

    library: Path
    software: bool
    memory: str
    out: Path
    sabotage: str | None
    failures: list[str] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def environment(self, scene: str, mode: str | None) -> dict[str, str]:
        """Environment of one scene: Sire's library is preloaded only where the scene is about that."""
        env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
        env |= {"PYTHONPATH": str(ROOT / "python-shim" / "src"), "SIRE_LIBRARY": str(self.library),
                "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        if self.software:
            env |= {"SIRE_SIM_MEMORY": self.memory, "SIRE_SIM_DEVICES": "1", "SIRE_SIM_DIR": str(self.out / "device")}
        if mode is not None:
            env["SIRE_HOOK_MODE"] = mode
        if mode == "preload":
            env["LD_PRELOAD"] = str(self.library)
        if scene == "turns" and self.sabotage in ("unmap-only", "skip-copy"):
            env["SIRE_LIBCUDA"] = str(self.saboteur())
        return env

    def saboteur(self) -> Path:
        """Compiles the driver that lies (see saboteur.c)."""
        assert self.sabotage is not None
        target = self.out / f"libsaboteur-{self.sabotage}.so"
        define = self.sabotage.replace("-", "_").upper()
        libcuda = os.environ.get("SIRE_DEMO_LIBCUDA", "libcuda.so.1")
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-D{define}", "-o", str(target), str(HERE / "saboteur.c"),
             "-Wl,--no-as-needed", libcuda if "/" in libcuda else f"-l:{libcuda}", f"-Wl,-rpath,{Path(libcuda).parent}"],
            check=True,
        )
        return target

    def scene(self, title: str, scene: str, mode: str | None = None, must: bool = True) -> dict[str, Any] | None:
        """Runs one scene; records a failure if it did not show what it must."""
        name = scene if mode is None else f"{scene}-{mode}"
        print(f"\n== {title}", flush=True)
        result = self.out / f"{name}.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "scenario.py"), scene, str(result)]
        if self.sabotage is not None:
            command += ["--sabotage", self.sabotage]
        done = subprocess.run(command, env=self.environment(scene, mode), check=False)
        if result.exists():
            self.results[name] = json.loads(result.read_text())
        if done.returncode != 0 and must:
            self.failures.append(f"{title} (exit status {done.returncode})")
        if done.returncode != 0 and not must:
            print(f"    the process ended with status {done.returncode}", flush=True)
        return self.results.get(name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def needed(path: Path) -> str:
    tool = shutil.which("readelf")
    if tool is None:
        return "(readelf is not installed)"
    text = subprocess.run([tool, "-d", str(path)], capture_output=True, text=True, check=True).stdout
    names = [line.split("[")[1].split("]")[0] for line in text.splitlines() if "(NEEDED)" in line]
    return ", ".join(names)


def torch_record() -> str:
    """Version of the PyTorch wheel, and a hash of the list of its files' own hashes."""
    import importlib.metadata

    distribution = importlib.metadata.distribution("torch")
    record = distribution.read_text("RECORD") or ""
    return f"{distribution.version}, RECORD sha256 {hashlib.sha256(record.encode()).hexdigest()[:16]}"


def introduce(show: Show) -> None:
    kind = f"the software CUDA device with {show.memory} (no GPU is used)" if show.software else "the NVIDIA GPU"
    print(f"Device:   {kind}")
    print(f"Library:  {show.library}, sha256 {digest(show.library)}, NEEDED: {needed(show.library)}")
    print(f"PyTorch:  the unmodified wheel, {torch_record()}")
    if show.sabotage:
        print(f"Sabotage: {show.sabotage}. This demo must now fail.")


def table(show: Show, mode: str) -> None:
    """Prints what one run of `turns` measured."""
    rows = show.results[f"turns-{mode}"]["rows"]
    times = f"{'pause':>8}{'resume':>9}{'copy':>9}"
    print(f"\n    {'model':<18}{'bytes':>9}{'before':>9}{'resident':>10}{'paused':>9}{'resumed':>9}   {'address':<16}{times}  exact")
    for row in rows:
        sizes = "".join(f"{row[key] / MIB:>{width},.0f}" for key, width in
                        (("model_bytes", 9), ("before", 9), ("resident", 10), ("paused", 9), ("resumed", 9)))
        times = f"{row['seconds_pause']:>7.3f}s{row['seconds_resume']:>8.3f}s{row['seconds_copy']:>8.3f}s"
        print(f"    {row['model']:<18}{sizes}   {row['address']:<16}{times}  "
              f"{'bit-identical' if row['exact'] else 'DIFFERENT'}, {row['max_difference_from_cpu']:.1e} from CPU")
    print("    (MiB of physical device memory, by the operating system's count on the software device and by the driver's on a GPU;")
    print("    copy: what a plain copy of the same bytes takes, by one thread in the same process)")


def picture(show: Show, mode: str) -> None:
    target = show.out / "memory.png"
    subprocess.run([sys.executable, str(HERE / "picture.py"), str(show.out / f"turns-{mode}.json"), str(target)], check=True)
    print(f"\n    picture of device memory over time: {target}")


def perform(show: Show) -> None:
    """The scenes, in order."""
    if show.sabotage:
        show.scene("With Sire and one thing broken: the models take turns", "turns", "preload")
        return
    show.scene("Without Sire: three models on a device that holds one", "baseline")
    for mode in ("preload", "torch"):
        how = "LD_PRELOAD=libsire_alloc.so" if mode == "preload" else "PyTorch's own pluggable allocator"
        if show.scene(f"With Sire, hook mode {mode} ({how}): the models take turns", "turns", mode):
            table(show, mode)
    if "turns-preload" in show.results:
        picture(show, "preload")
    show.scene("While a model is paused another process takes its memory", "contention", "preload")
    show.scene("Control: the published torch-memory-saver on the same device", "control", must=False)
    show.scene("Control: torch-memory-saver, resume while the memory is taken", "control-contention", must=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--software", action="store_true")
    parser.add_argument("--memory", default="600MiB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sabotage", choices=SABOTAGES)
    return parser.parse_args()


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        show = Show(options.library, options.software, options.memory, options.out, options.sabotage)
        os.environ["TMPDIR"] = scratch
        started = time.monotonic()
        introduce(show)
        perform(show)
    if options.json:
        options.json.write_text(json.dumps(figures(show.results), indent=1) + "\n")
    print(f"\n{time.monotonic() - started:.0f} seconds.", end=" ")
    if show.failures:
        print("The demo FAILED:\n  " + "\n  ".join(show.failures))
        return 1
    print("Everything that this demo claims was shown.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
