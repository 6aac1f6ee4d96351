"""What a built wheel is: name, size, and of the libraries and the command in it the oldest glibc and what they load.

Usage: wheel.py WHEEL [--at-most 2.28]. Fails if a part is missing, needs a newer glibc, or loads what no Linux is sure
to have.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python-shim"))

import glibc_floor

PARTS = (r"sire/_native/libsire_alloc\.so", r"sire/_native/libsire_driver\.so", r"sire_alloc-[^/]+\.data/scripts/sire")
# Parts of glibc, and the compiler's runtime, which every manylinux system has.
ALLOWED = re.compile(r"(libc|libm|libdl|libpthread|librt|libgcc_s|ld-linux-[a-z0-9-]+)\.so\.\d+")


def needed(path: Path) -> list[str]:
    """The libraries that a program or library names as NEEDED."""
    listing = subprocess.run(["readelf", "--wide", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", listing)


def problems(path: Path, limit: glibc_floor.Version | None) -> list[str]:
    """Prints what a part is; returns what is wrong with it."""
    libraries = needed(path)
    major, minor = max(glibc_floor.needed(path))
    print(f"  {path.name}: {path.stat().st_size:,} bytes, glibc {major}.{minor} or newer, loads {', '.join(libraries)}")
    wrong = [f"{path.name} loads {name}" for name in libraries if not ALLOWED.fullmatch(name)]
    if limit is not None and (major, minor) > limit:
        wrong.append(f"{path.name} needs glibc {major}.{minor}, above {limit[0]}.{limit[1]}")
    return wrong


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a built wheel is, and whether it may be given away.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--at-most", type=glibc_floor.parse, default=None, metavar="X.Y")
    arguments = parser.parse_args()
    wheel: Path = arguments.wheel
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")
    wrong = []
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        for part in PARTS:
            found = [name for name in archive.namelist() if re.fullmatch(part, name)]
            if len(found) == 1:
                wrong += problems(Path(archive.extract(found[0], scratch)), arguments.at_most)
            else:
                wrong.append(f"{len(found)} files of {wheel.name} match {part}, not one")
    if arguments.at_most is not None:
        tag = "manylinux_{}_{}".format(*arguments.at_most)
        if tag not in wheel.name:
            wrong.append(f"the wheel's name does not say {tag}")
    for each in wrong:
        print(f"scripts/wheel: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
