"""Writes `device_checks.txt`: which CUDA operations insist on one device, and the method their error names.

Run it in an environment of the software device after a change of PyTorch's release:
    python device_checks.py > ../sire_software_device/device_checks.txt
It reads the wheel's own native_functions.yaml (`device_check: NoCheck` exempts) and its CUDA library's strings.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch


def exempt(text: str) -> dict[str, bool]:
    """Name of each function in the YAML text, and whether it is exempt (itself, or through what it delegates to)."""
    found: dict[str, bool] = {}
    delegates: dict[str, str] = {}
    for entry in re.split(r"^- func: ", text, flags=re.M)[1:]:
        name = entry[: entry.index("(")]
        found[name] = "device_check: NoCheck" in entry
        target = re.search(r"structured_delegate: (\S+)", entry)
        if target:
            delegates[name] = target.group(1)
    for name, target_name in delegates.items():
        found[name] = found[name] or found.get(target_name, False)
    return found


def methods(library: bytes) -> set[str]:
    """The method names that the library's wrappers mention."""
    return {match.decode() for match in re.findall(rb"wrapper_CUDA_[A-Za-z0-9_]+", library)}


def main() -> None:
    """Print one line `operation method` for each operation that checks."""
    root = Path(torch.__file__).parent
    text = (root.parent / "torchgen/packaged/ATen/native/native_functions.yaml").read_text()
    exemptions = exempt(text)
    known = methods((root / "lib/libtorch_cuda.so").read_bytes())
    print("# operation, and the method that PyTorch's error names; written by tools/device_checks.py")
    for qualified in sorted(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")):
        name = qualified.removeprefix("aten::")
        if not qualified.startswith("aten::") or exemptions.get(name, True):
            continue
        base, _, overload = name.partition(".")
        usual = [f"wrapper_CUDA_{overload}_{base}", f"wrapper_CUDA_{base}", f"wrapper_CUDA_{base}_out_{overload}"]
        hits = [method for method in usual if method in known]
        print(qualified, hits[0] if hits else usual[0])


if __name__ == "__main__":
    main()
