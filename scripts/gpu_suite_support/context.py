"""What a run is about: the parts that are under test, where they were found, and the environment of child processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent


def gpu_is_usable() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


@dataclass
class Context:
    """One run."""

    device: str
    library: Path
    bundle: Path | None
    python: str
    scratch: Path
    deadline: float
    driver: str = "libcuda.so.1"
    runtime: str = ""
    torch: str = ""
    stand_in: Path | None = None
    software_memory: str = "2GiB"
    unusable: dict[str, str] = field(default_factory=dict)

    @property
    def software(self) -> bool:
        """Whether the device is the software device."""
        return self.device == "software"

    def left(self, wanted: float) -> float:
        """`wanted` seconds, or what the budget still allows."""
        return max(0.0, min(wanted, self.deadline - time.monotonic()))

    def find(self, name: str) -> Path | None:
        """A file of the bundle, else one that a build left in the tree."""
        places = [self.bundle] if self.bundle else []
        for place in [*places, self.library.parent, ROOT / "target" / "release"]:
            if (place / name).exists():
                return place / name
        return None

    def env(self, *, preload: bool = False, shared: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a child.

        `preload`: with the library preloaded. `shared`: on the software device, processes that give the same name
        see the same device.
        """
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SIRE_", "TMS_")) and key != "LD_PRELOAD"}
        env["PYTHONUNBUFFERED"] = "1"
        env["PYTHONPATH"] = os.pathsep.join(
            part for part in [str(SUPPORT.parent), str(ROOT / "python-shim" / "src"), os.environ.get("PYTHONPATH", "")] if part
        )
        env["SIRE_LIBRARY"] = str(self.library)
        env["SIRE_TEST_DEVICE"] = self.device
        runtime = self.stand_in if self.software else Path(self.runtime).parent if self.runtime else None
        if runtime is not None:
            env["LD_LIBRARY_PATH"] = os.pathsep.join(part for part in [os.environ.get("LD_LIBRARY_PATH", ""), str(runtime)] if part)
        if self.software:
            env["SIRE_SIM_MEMORY"] = self.software_memory
            if shared is not None:
                directory = self.scratch / f"device-{shared}"
                directory.mkdir(parents=True, exist_ok=True)
                env["SIRE_SIM_DIR"] = str(directory)
        if preload:
            env["LD_PRELOAD"] = str(self.library)
        return env | more

    def probe(self, module: str, *arguments: str) -> list[str]:
        """The command of the probe `module`."""
        return [self.python, "-m", f"gpu_suite_support.probes.{module}", *arguments]

    def cuda_arguments(self) -> list[str]:
        """How probes are told which driver and runtime to load."""
        return ["--driver", self.driver, *(["--runtime", self.runtime] if self.runtime else [])]


def stand_in_directory(python: str, bundle: Path | None) -> Path | None:
    """The folder with the stand-in under NVIDIA's names: of `python`'s software environment, else of the bundle."""
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    try:
        site = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        site = ""
    places = [Path(site) / "nvidia" / directory / "lib" for directory in ("cu13", "cuda_runtime")] if site else []
    places += [bundle / "stand-in"] if bundle else []
    return next((place for place in places if (place / "libcuda.so.1").exists()), None)
