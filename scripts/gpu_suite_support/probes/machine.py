"""Says what this Python is: versions of its packages, and what PyTorch loads. Imports PyTorch if there is one."""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "pytest", "transformers", "torch_memory_saver", "sire-alloc")


def loaded(pattern: str) -> str:
    """Path of a library that this process has mapped, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.search(pattern, path):
            return path
    return ""


def main() -> int:
    """Prints the facts."""
    facts: dict[str, Any] = {"python": platform.python_version(), "packages": {}}
    for name in PACKAGES:
        try:
            facts["packages"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts["packages"][name] = None
    try:
        import torch

        facts["torch"] = torch.__version__
        facts["torch_cuda"] = torch.version.cuda
        facts["cuda_available"] = torch.cuda.is_available()
        if facts["cuda_available"]:
            facts["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # a broken PyTorch is a fact about the machine too
        facts["torch_error"] = f"{type(error).__name__}: {error}"
    facts["runtime"] = loaded(r"libcudart[^/]*\.so")
    facts["driver"] = loaded(r"libcuda\.so")
    print(json.dumps(facts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
