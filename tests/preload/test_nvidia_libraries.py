"""NVIDIA's own libraries under driver-level hooks, as far as they start on the software device: wherever they are installed.

They are looked for in the wheels `nvidia-cublas` and `nvidia-nccl-cu13` beside this interpreter's packages, as PyTorch brings them. They are
large, so scripts/test installs none; `SIRE_TEST_CUBLAS` and `SIRE_TEST_NCCL` name others: `libcublas.so.*` (with `libcublasLt.so.*` beside it)
and `libnccl.so.2`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import Workshop, check

NAMES = {"cublas": "libcublas.so.13", "nccl": "libnccl.so.2"}
# The wheel of CUDA 12 has NCCL under the same name.
WHEELS = {"cublas": "nvidia_cublas-*.dist-info", "nccl": "nvidia_nccl_cu13-*.dist-info"}


def installed(kind: str) -> Path | None:
    """The library that is named, or else the first of a wheel; not the software device, which has its name in environments of its own."""
    named = os.environ.get(f"SIRE_TEST_{kind.upper()}")
    if named:
        return Path(named).resolve()
    folders = [Path(folder) for folder in sys.path if any(Path(folder).glob(WHEELS[kind]))]
    wheels = (path for folder in folders for path in sorted(folder.glob(f"nvidia/*/lib/{NAMES[kind]}")))
    return next((path for path in wheels if path.resolve().name == NAMES[kind]), None)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("order", ["driver first", "driver last"])
def test_its_own_runtime_finds_sires_functions(workshop: Workshop, sim_dir: Path, driver_so: Path, kind: str, order: str) -> None:
    path = installed(kind)
    if path is None:
        pytest.skip(f"{NAMES[kind]} is in no wheel here, and SIRE_TEST_{kind.upper()} names none")
    both = [str(driver_so), str(workshop.sire_so)]
    settings = {"LD_PRELOAD": " ".join(both if order == "driver first" else both[::-1]), "SIRE_SIM_MEMORY": "256MiB"}
    program = workshop.program("nvidia_library.c", f"-L{sim_dir}", "-l:libcuda.so.1")
    done = check(workshop.run(program, kind, str(path), folders=(sim_dir, path.parent), extra=settings))
    answered, version, status = map(int, done.stdout.split()[-3:])
    # Its runtime asks for some hundred functions by cuGetProcAddress, which it has by dlsym; all of the table that it wants are Sire's.
    assert answered >= 20
    assert version > 0
    # Then it wants the driver's private tables, which are nobody's to fake: the first function that is missing, and the last that it asks for.
    assert status == 0 or "not simulated: cuGetExportTable" in done.stderr


def test_the_software_device_is_taken_for_no_library_of_nvidias(tmp_path: Path, sim_so: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in NAMES.items():
        for folder, target in (("a", sim_so), ("b", None)):
            place = tmp_path / folder / "nvidia" / "cu13" / "lib" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(target) if target else place.write_bytes(b"")
            (tmp_path / folder / WHEELS[kind].replace("*", "1.0")).mkdir()
        monkeypatch.delenv(f"SIRE_TEST_{kind.upper()}", raising=False)
        monkeypatch.setattr(sys, "path", [str(tmp_path / "a")])
        assert installed(kind) is None
        monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
        found = installed(kind)
        assert found is not None
        assert found.parent == tmp_path / "b" / "nvidia" / "cu13" / "lib"
