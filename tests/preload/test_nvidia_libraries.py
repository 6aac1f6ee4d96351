"""NVIDIA's own libraries under driver-level hooks, as far as they start on the software device. On request: they are large, and not installed here.

`SIRE_TEST_CUBLAS` and `SIRE_TEST_NCCL` name `libcublas.so.*` (with `libcublasLt.so.*` beside it) and `libnccl.so.2`, of the wheels
`nvidia-cublas` and `nvidia-nccl-cu13`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Workshop, check


@pytest.mark.parametrize(("kind", "variable"), [("cublas", "SIRE_TEST_CUBLAS"), ("nccl", "SIRE_TEST_NCCL")])
@pytest.mark.parametrize("order", ["driver first", "driver last"])
def test_its_own_runtime_finds_sires_functions(workshop: Workshop, sim_dir: Path, driver_so: Path, kind: str, variable: str, order: str) -> None:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no library")
    path = Path(os.environ[variable]).resolve()
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
