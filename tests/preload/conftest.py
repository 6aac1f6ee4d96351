"""What every test here needs: the two libraries, a C compiler, and a way to run a program under them.

Only the standard library and pytest. `SIRE_ALLOC_SO` and `SIRE_SIM_SO` name the libraries; without them the newest
build of this checkout is taken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIXTURES = HERE / "fixtures"
COMPILER = os.environ.get("CC", "cc")
CXX = os.environ.get("CXX", "c++")
WARNINGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]


def _library(variable: str, name: str) -> Path:
    """The library that `variable` names, else the newest build of this checkout."""
    named = os.environ.get(variable)
    if named:
        path = Path(named).resolve()
        if not path.is_file():
            pytest.fail(f"{variable} names {path}, which does not exist")
        return path
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    built = [path for kind in ("release", "debug") if (path := target / kind / name).is_file()]
    if not built:
        pytest.skip(f"{name} is not built: `cargo build --release`, or name it in {variable}")
    return max(built, key=lambda path: path.stat().st_mtime).resolve()


@pytest.fixture(scope="session")
def sire_so() -> Path:
    """libsire_alloc.so."""
    return _library("SIRE_ALLOC_SO", "libsire_alloc.so")


@pytest.fixture(scope="session")
def driver_so() -> Path:
    """libsire_driver.so."""
    return _library("SIRE_DRIVER_SO", "libsire_driver.so")


@pytest.fixture(scope="session")
def sim_so() -> Path:
    """The software device as a drop-in."""
    return _library("SIRE_SIM_SO", "libsire_sim_cuda.so")


@pytest.fixture(scope="session")
def sim_dir(sim_so: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the software device has the names of NVIDIA's libraries."""
    folder = tmp_path_factory.mktemp("software-device")
    for name in ("libcudart.so.13", "libcudart.so.12", "libcuda.so.1", "libnvidia-ml.so.1"):
        (folder / name).symlink_to(sim_so)
    return folder


def compile_c(output: Path, source: Path, *arguments: str | Path) -> Path:
    """Compiles one C (or C++) file."""
    cxx = source.suffix == ".cpp"
    compiler, options = (CXX, ["-O1", "-g", "-Wall", "-Werror", "-pthread"]) if cxx else (COMPILER, WARNINGS)
    command = [compiler, *options, "-I", ROOT / "include", "-I", HERE, source, "-o", output, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.fail(f"{source.name} does not compile:\n{done.stderr}")
    return output


@dataclass
class Workshop:
    """Builds programs once per session and runs them."""

    folder: Path
    sire_so: Path
    runtime_dir: Path | None = None
    built: dict[str, Path] = field(default_factory=dict)

    @property
    def link_runtime(self) -> Path:
        """Something to link against that has the runtime's names; never the one that runs."""
        return self.fixture("libcudart.so.13", FIXTURES / "runtime.c", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.13")

    def fixture(self, name: str, source: Path, *arguments: str | Path, subdirectory: str = "fixture") -> Path:
        """A helper library, built once."""
        key = f"{subdirectory}/{name}"
        if key not in self.built:
            folder = self.folder / subdirectory
            folder.mkdir(exist_ok=True)
            self.built[key] = compile_c(folder / name, source, *arguments)
        return self.built[key]

    def program(self, source: str, *arguments: str | Path, runtime: bool = True) -> Path:
        """A program of this folder, built once; it links Sire and (`runtime`) the CUDA runtime."""
        if source not in self.built:
            libraries: list[str | Path] = [self.sire_so, "-ldl"]
            if runtime:
                libraries += ["-Wl,--no-as-needed", self.link_runtime]
            output = self.folder / Path(source).stem
            self.built[source] = compile_c(output, HERE / source, *arguments, *libraries)
        return self.built[source]

    def environment(self, *folders: Path, preload: bool = True, **variables: str) -> dict[str, str]:
        """A clean environment in which `folders` hold the CUDA libraries."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SIRE_", "TMS_", "LD_", "PYTORCH_"))}
        if folders:
            kept["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, folders), str(self.sire_so.parent)])
        else:
            kept["LD_LIBRARY_PATH"] = str(self.sire_so.parent)
        if preload:
            kept["LD_PRELOAD"] = str(self.sire_so)
        kept.update(variables)
        return kept

    def run(
        self,
        program: Path,
        *arguments: str,
        folders: tuple[Path, ...] = (),
        preload: bool = True,
        timeout: float = 120,
        extra: dict[str, str] | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end."""
        environment = self.environment(*folders, preload=preload, **variables) | (extra or {})
        return subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, timeout=timeout, errors="replace")


def check(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Fails with everything the program said if it did not end well."""
    assert done.returncode == 0, f"exit {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def workshop(sire_so: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Programs under the library."""
    if shutil.which(COMPILER) is None:
        pytest.skip("no C compiler; set CC")
    return Workshop(tmp_path_factory.mktemp("programs"), sire_so)
