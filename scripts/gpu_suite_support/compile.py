"""Finds a C program in the bundle, or compiles it here against an empty runtime of the right name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from . import child
from .context import Context

STUB = """int cudaMalloc(void **out, unsigned long bytes) { (void)out; (void)bytes; return 999; }
int cudaFree(void *pointer) { (void)pointer; return 999; }
"""


def program(context: Context, name: str, source: Path) -> tuple[Path | None, str]:
    """The program, or None and the reason."""
    prebuilt = context.find(name)
    if prebuilt is not None:
        return prebuilt, ""
    if shutil.which("cc") is None:
        return None, f"{name} is not in the bundle and there is no C compiler (cc) to build {source.name} with"
    return build(context.scratch, name, source, dict(os.environ))


def build(folder: Path, name: str, source: Path, env: dict[str, str]) -> tuple[Path | None, str]:
    """Compiles `source` into `folder`; its NEEDED entry is libcudart.so.13, whichever copy the machine has."""
    stub = folder / "libcudart.so.13"
    (folder / "stub.c").write_text(STUB)
    commands = [
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.13", "-o", str(stub), str(folder / "stub.c")],
        [
            "cc",
            "-O2",
            "-Wall",
            "-o",
            str(folder / name),
            str(source),
            "-Wl,--no-as-needed",
            str(stub),
            "-ldl",
            "-lpthread",
        ],
    ]
    for command in commands:
        outcome = child.run(command, env=env, timeout=60)
        if not outcome.ok:
            return None, f"{' '.join(command)}: {outcome.tail()}"
    stub.unlink()
    return folder / name, ""
