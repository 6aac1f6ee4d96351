"""Makes the reference of the Python API with pdoc, and looks whether every public name is in it, with a docstring. Started by scripts/api-reference."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

# sire.vllm can only be imported beside vLLM; its page is docs/coming-from.md.
MODULES = (
    "sire",
    "sire.compat",
    "sire.control",
    "sire.distributed",
    "sire.memory",
    "sire.models",
    "sire.slyce",
    "sire.slyce.models",
    "sire.torch_memory_saver",
    "sire.torchtools",
)


def make(folder: Path) -> None:
    """Every module's page."""
    command = [sys.executable, "-W", "error::UserWarning", "-m", "pdoc", "--docformat", "google", "--output-directory", str(folder), *MODULES]
    subprocess.run(command, check=True)


def lacking(folder: Path) -> list[str]:
    """Public names that the reference does not have, and those that say nothing of themselves."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        page = (folder / Path(*name.split(".")).with_suffix(".html")).read_text()
        anchors = set(re.findall(r'<section id="([^"]+)"', page))
        for public in getattr(module, "__all__", ()):
            member: Any = getattr(module, public)
            if public not in anchors and not public.startswith("__"):
                found.append(f"{name}.{public} is not on its page")
            if (inspect.isclass(member) or inspect.isroutine(member)) and not inspect.getdoc(member):
                found.append(f"{name}.{public} has no docstring")
    return found


def main() -> int:
    folder = Path(sys.argv[1])
    make(folder)
    wrong = lacking(folder)
    print("\n".join(wrong) or f"API reference: {folder / 'index.html'}, {len(MODULES)} modules")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
