"""Puts the two libraries and the ``sire`` command into the wheel, building them with cargo.

SIRE_PREBUILT=DIR takes ``libsire_alloc.so``, ``libsire_driver.so`` and ``sire`` from DIR instead.
SIRE_WHEEL_TARGET=2.28 builds the release form with cargo-zigbuild, for every Linux with that glibc, and refuses the
result if it needs more.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent))
import glibc_floor

LIBRARY = "libsire_alloc.so"
DRIVER_LIBRARY = "libsire_driver.so"
COMMAND = "sire"


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Runs before hatchling writes a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds, and tells hatchling which files go where."""
        if platform.system() != "Linux":
            raise RuntimeError("Sire runs on Linux only: it stands between a program and NVIDIA's Linux driver.")
        floor = os.environ.get("SIRE_WHEEL_TARGET")
        products = self._prebuilt() or self._build(floor)
        build_data["pure_python"] = False
        build_data["tag"] = _wheel_tag(products, floor)
        build_data["shared_scripts"][str(products / COMMAND)] = COMMAND
        if version == "editable":
            # The package lies in the checkout and finds the library in target/ there.
            self._explain_editable(products)
            return
        included = build_data["force_include"]
        for library in (LIBRARY, DRIVER_LIBRARY):
            included[str(products / library)] = f"sire/_native/{library}"
        included[str(self._write_build_id(products))] = "sire/_native/build_id.txt"

    def dependencies(self) -> list[str]:
        """What pip installs for the build beside hatchling."""
        return ["cargo-zigbuild", "ziglang"] if os.environ.get("SIRE_WHEEL_TARGET") else []

    # --- the products -----------------------------------------------------------------------------------

    def _prebuilt(self) -> Path | None:
        named = os.environ.get("SIRE_PREBUILT")
        if not named:
            return None
        directory = Path(named).resolve()
        for name in (LIBRARY, DRIVER_LIBRARY, COMMAND):
            if not (directory / name).is_file():
                raise RuntimeError(f"SIRE_PREBUILT={named} has no file {name}; build all three with scripts/build")
        return directory

    def _build(self, floor: str | None) -> Path:
        checkout = self._checkout()
        cargo = shutil.which("cargo")
        if cargo is None:
            raise RuntimeError(
                "Sire's library is written in Rust and 'cargo' is not on the PATH. Install Rust 1.90 or later "
                "with rustup, install a ready wheel, or name a directory with libsire_alloc.so, "
                "libsire_driver.so and sire in SIRE_PREBUILT."
            )
        target = f"{platform.machine()}-unknown-linux-gnu"
        command = [cargo, "build"]
        if floor:
            command = [cargo, "zigbuild", "--target", f"{target}.{floor}"]
        command += ["--release", "--locked", "-p", "sire-alloc", "-p", "sire-driver-hooks", "-p", "sire-cli"]
        self.app.display_info(f"building Sire's library and command: {' '.join(command)}")
        environment = _with_zig(os.environ) if floor else dict(os.environ)
        result = subprocess.run(command, cwd=checkout, env=environment, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed in {checkout}; its messages are above.")
        directory = Path(os.environ.get("CARGO_TARGET_DIR", checkout / "target"))
        return (checkout / directory / target / "release") if floor else (checkout / directory / "release")

    def _checkout(self) -> Path:
        checkout = Path(self.root).resolve().parent
        if not (checkout / "Cargo.toml").is_file() or not (checkout / "cdylib").is_dir():
            raise RuntimeError(
                "the Rust sources are not beside this directory: a source distribution of sire-alloc holds the "
                "Python part only. Install from a clone of the repository (pip install ./python-shim), install a "
                "wheel, or name a directory with libsire_alloc.so, libsire_driver.so and sire in SIRE_PREBUILT."
            )
        return checkout

    def _write_build_id(self, products: Path) -> Path:
        library = ctypes.CDLL(str(products / LIBRARY))
        library.sire_build_id.restype = ctypes.c_char_p
        directory = Path(self.directory) / "sire-build"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "build_id.txt"
        path.write_bytes(library.sire_build_id() + b"\n")
        return path

    def _explain_editable(self, products: Path) -> None:
        expected = Path(self.root).resolve().parent / "target"
        if expected not in products.parents:
            self.app.display_warning(
                f"the library was built in {products}, not in {expected}: set SIRE_LIBRARY={products / LIBRARY}"
            )

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what was only needed while building."""
        shutil.rmtree(Path(self.directory) / "sire-build", ignore_errors=True)


def _with_zig(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which cargo-zigbuild finds the compiler of the PyPI package ``ziglang``."""
    zig = importlib.util.find_spec("ziglang")
    if shutil.which("cargo-zigbuild") is None or zig is None or not zig.submodule_search_locations:
        raise RuntimeError(
            "SIRE_WHEEL_TARGET needs cargo-zigbuild and zig, which pip installs for the build; without build "
            "isolation, first: pip install cargo-zigbuild ziglang"
        )
    compiler = Path(zig.submodule_search_locations[0]) / "zig"
    return {**environment, "CARGO_ZIGBUILD_ZIG_PATH": str(compiler)}


def _wheel_tag(products: Path, floor: str | None) -> str:
    machine = platform.machine()
    if not floor:
        return f"py3-none-linux_{machine}"
    wanted = glibc_floor.parse(floor)
    for name in (LIBRARY, DRIVER_LIBRARY, COMMAND):
        glibc_floor.require(products / name, wanted)
    return f"py3-none-manylinux_{wanted[0]}_{wanted[1]}_{machine}"
