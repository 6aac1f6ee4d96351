"""The demo, told in order. Started by `scripts/demo` with everything built and installed; imports no torch itself.

The scenes run in processes of their own (`scenario.py`). The demo succeeds only if every scene showed what it is meant to
show; with `--sabotage` one thing is broken on purpose, and the demo must therefore fail, in either hook mode.
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
SABOTAGES = ("unmap-only", "skip-copy", "move-address")


@dataclass
class Show:
    """What the scenes need, and what they have shown so far. `out` is for the user, `scratch` for this run alone."""

    library: Path
    software: bool
    memory: str
    out: Path
    scratch: Path
    sabotage: str | None
    failures: list[str] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def environment(self, mode: str | None) -> dict[str, str]:
        """Environment of one process: Sire's library is preloaded only where its scenes are about that."""
        env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
        env |= {
            "PYTHONPATH": str(ROOT / "python-shim" / "src"),
            "SIRE_LIBRARY": str(self.library),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
        }
        if self.software:
            # Fresh device memory is poisoned at the start of each frame only: filling all of it would be most of the time.
            env |= {"SIRE_SIM_MEMORY": self.memory, "SIRE_SIM_DEVICES": "1", "SIRE_SIM_DIR": str(self.scratch / "device"), "SIRE_SIM_POISON": "sample"}
        if mode is not None:
            env["SIRE_HOOK_MODE"] = mode
        if mode == "preload":
            env["LD_PRELOAD"] = str(self.library)
        if mode is not None and self.sabotage in ("unmap-only", "skip-copy"):
            env["SIRE_LIBCUDA"] = str(self.saboteur())
        return env

    def saboteur(self) -> Path:
        """Compiles the driver that lies (see saboteur.c)."""
        assert self.sabotage is not None
        target = self.scratch / f"libsaboteur-{self.sabotage}.so"
        define = self.sabotage.replace("-", "_").upper()
        libcuda = os.environ.get("SIRE_DEMO_LIBCUDA", "libcuda.so.1")
        subprocess.run(
            [
                "cc",
                "-shared",
                "-fPIC",
                f"-D{define}",
                "-o",
                str(target),
                str(HERE / "saboteur.c"),
                "-Wl,--no-as-needed",
                libcuda if "/" in libcuda else f"-l:{libcuda}",
                f"-Wl,-rpath,{Path(libcuda).parent}",
            ],
            check=True,
        )
        return target

    def play(self, *scenes: str, mode: str | None = None, must: bool = True) -> None:
        """Runs scenes in one process; records a failure if one did not show what it must."""
        names = {scene: f"{scene}-{mode}" if mode and scene in ("turns", "contention") else scene for scene in scenes}
        command = [sys.executable, str(HERE / "scenario.py"), str(self.scratch), *scenes]
        if self.sabotage is not None:
            command += ["--sabotage", self.sabotage]
        done = subprocess.run(command, env=self.environment(mode), check=False)
        missing = []
        for scene, name in names.items():
            result = self.scratch / f"{name}.json"
            if result.exists():
                self.results[name] = json.loads(result.read_text())
            else:
                missing.append(scene)
        if done.returncode != 0 and must:
            where = f" in hook mode {mode}" if mode else ""
            self.failures.append(f"{(missing or ['the end'])[0]}{where} (exit status {done.returncode})")
        if done.returncode != 0 and not must:
            print(f"    the process ended with status {done.returncode}", flush=True)


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


def picture(show: Show, mode: str) -> None:
    target = show.out / "memory.png"
    subprocess.run([sys.executable, str(HERE / "picture.py"), str(show.scratch / f"turns-{mode}.json"), str(target)], check=True)
    print(f"\n    picture of device memory over time: {target}")


def perform(show: Show) -> None:
    """The scenes, in order."""
    if show.sabotage:
        for mode in ("preload", "torch"):
            show.play("turns", mode=mode)
        return
    show.play("baseline", "turns", mode="torch")
    show.play("turns", "contention", mode="preload")
    if "turns-preload" in show.results:
        picture(show, "preload")
    show.play("serving", mode="torch")
    show.play("control", "control-contention", must=False)


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
        show = Show(options.library, options.software, options.memory, options.out, Path(scratch), options.sabotage)
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
