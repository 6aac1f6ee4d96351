"""Builds the measuring programs and says where they run: on the software device in timing mode, or on a GPU's own runtime."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .figures import MIB, Unmeasurable, Wrong

ROOT = Path(__file__).resolve().parents[2]
PEER_C = ROOT / "benches" / "peer"
# Memory of a device beside what a program asks for: slabs, rounding.
ROOM = 64 * MIB
# Folders in which a real runtime is usually found.
RUNTIMES = ("/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu")


def environments(checkout: Path = ROOT) -> list[Path]:
    """The environments with PyTorch that the checkout has; the one with the newest is the last."""
    return sorted((checkout / ".sire").glob("env-*"), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def built(variable: str, name: str) -> Path:
    """The library that `variable` names, else the release build."""
    path = Path(os.environ.get(variable) or Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / name)
    if not path.is_file():
        raise Wrong(f"{path} does not exist; build it with scripts/build, or name it in {variable}")
    return path.resolve()


def real_runtime() -> Path | None:
    """A folder with NVIDIA's libcudart.so.13, if there is one."""
    named = os.environ.get("SIRE_BENCH_CUDA")
    folders = [Path(named)] if named else [Path(folder) for folder in RUNTIMES]
    return next((folder for folder in folders if (folder / "libcudart.so.13").exists()), None)


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA GPU."""
    return any(Path(f"/dev/nvidia{number}").exists() for number in range(8))


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def read(path: str) -> str:
    """A file of the system, or '?'."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "?"


@dataclass(frozen=True)
class Place:
    """The saver that is preloaded: a name to show and its library."""

    name: str
    library: Path


class Workshop:
    """The programs and their environment."""

    def __init__(self, folder: Path, software: bool, sabotage: str | None) -> None:
        self.software = software
        self.sire = Place("sire", built("SIRE_ALLOC_SO", "libsire_alloc.so"))
        stub = folder / "libcudart.so.13"
        self._cc(stub, ROOT / "tests" / "preload" / "fixtures" / "runtime.c", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.13")
        self.cuda = self._software(folder / "device") if software else self._real()
        link = ["-Wl,--no-as-needed", str(stub), "-ldl"]
        sources = {name: PEER_C / f"{name}.c" for name in ("cycle", "raw", "scale", "clean", "share", "file")}
        sources |= {name: ROOT / "benches" / f"{name}.c" for name in ("stall", "hooks", "passthrough")}
        self.programs = {name: self._cc(folder / name, source, *link) for name, source in sources.items()}
        self.liar = self._liar(folder, sabotage) if sabotage else None
        self.device = "software" if software else "GPU"

    @property
    def described(self) -> str:
        """Device and machine, for the figures."""
        return f"{self.device}; {cpu_model()}, {os.cpu_count()} CPUs, Linux {platform.release()}"

    def environment(self, saver: Place | None, memory: int, timing: bool = True) -> dict[str, str]:
        """For a program that uses `memory` bytes of the device."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SIRE_", "TMS_", "LD_PRELOAD"))}
        kept |= {"LD_LIBRARY_PATH": str(self.cuda), "SIRE_LOG": "error"}
        if self.software:
            kept |= {"SIRE_SIM_POISON": "off", "SIRE_SIM_MEMORY": str((memory + ROOM + 2 * MIB - 1) // (2 * MIB) * (2 * MIB))}
            if timing:
                kept["SIRE_SIM_TIMING"] = "1"
        if saver:
            kept["LD_PRELOAD"] = str(saver.library)
        if self.liar:
            kept["SIRE_LIBCUDA"] = str(self.liar)
        return kept

    @staticmethod
    def _cc(output: Path, source: Path, *arguments: str) -> Path:
        command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O3", "-pthread", str(source), "-o", str(output), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Wrong(f"{source.name} does not compile:\n{done.stderr}")
        return output

    @staticmethod
    def _software(folder: Path) -> Path:
        library = built("SIRE_SIM_SO", "libsire_sim_cuda.so")
        folder.mkdir()
        for name in ("libcudart.so.13", "libcudart.so.12", "libcuda.so.1"):
            (folder / name).symlink_to(library)
        return folder

    @staticmethod
    def _real() -> Path:
        folder = real_runtime()
        if folder is None:
            raise Wrong("no folder with NVIDIA's libcudart.so.13 was found; name it in SIRE_BENCH_CUDA, or use --device software")
        return folder

    def _liar(self, folder: Path, sabotage: str) -> Path:
        """A driver that lies, to show that the bench would notice."""
        if not self.software:
            raise Unmeasurable("--sabotage is for the software device")
        source = ROOT / "scripts" / "demo_support" / "saboteur.c"
        flag = "-D" + sabotage.upper().replace("-", "_")
        return self._cc(folder / "liar.so", source, flag, "-shared", "-fPIC", "-Wl,--no-as-needed", str(self.cuda / "libcuda.so.1"))
