"""Looks at the built libraries from outside: the header, what they need, what they export, that they are harmless.

``library.py LIBSIRE_ALLOC LIBSIRE_DRIVER LIBSIRE_SIM_CUDA HEADER`` prints one line per check, and fails if one fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ALLOWED = re.compile(r"(libc|libm|libgcc_s|libpthread|libdl|librt|ld-linux-x86-64|ld-linux-aarch64)\.so\.\d+$")
"""What a library that is loaded into other people's processes may need: no CUDA library, no C++ runtime."""


def output(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stdout}")
    return done.stdout


def exports(library: Path) -> set[str]:
    """The names that the library defines for others."""
    lines = output("nm", "--dynamic", "--defined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if len(line.split()) == 3 and line.split()[1] in "TWi"}


def declared(header: Path) -> set[str]:
    """The functions that the header declares."""
    plain = re.sub(r"/\*.*?\*/|//[^\n]*", "", header.read_text(), flags=re.DOTALL)
    return set(re.findall(r"\b((?:sire|tms)_\w+|set_memory_margin_bytes)\s*\(", plain))


def check_needed(library: Path) -> str:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "--dynamic", library))
    wrong = [name for name in needed if not ALLOWED.match(name)]
    assert needed, "no NEEDED entries at all: is this a dynamic library?"
    assert not wrong, f"it needs {', '.join(wrong)}"
    return ", ".join(needed)


def check_exports(library: Path, header: Path) -> str:
    """Everything declared is there, and everything there is declared or a hooked CUDA name."""
    found, promised = exports(library), declared(header)
    missing = sorted(promised - found)
    assert promised, "the header declares nothing"
    assert not missing, f"declared but not exported: {', '.join(missing)}"
    strangers = sorted(name for name in found - promised if not re.match(r"(cuda|sire_|tms_)", name))
    assert not strangers, f"exported but neither declared nor hooked: {', '.join(strangers)}"
    return f"{len(promised)} declared, {len(found)} exported"


def check_header(header: Path) -> str:
    """The header is complete in C and in C++."""
    with tempfile.TemporaryDirectory() as folder:
        for language, compiler, standard in (("c", "cc", "-std=c11"), ("c++", "c++", "-std=c++17")):
            source = Path(folder, "use.c")
            source.write_text('#include "sire.h"\nint main(void) { return sire_abi_version() == 0; }\n')
            options = ["-x", language, standard, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
            output(compiler, *options, "-I", header.parent, source)
    return "complete in C11 and C++17"


def check_driver(library: Path) -> str:
    """`dlsym` and the driver's names, and nothing that anybody else could mean."""
    found = exports(library)
    strangers = sorted(name for name in found - {"dlsym"} if not re.match(r"cu[A-Z]", name))
    assert "dlsym" in found and not strangers, f"exported: {', '.join(strangers) or 'no dlsym'}"
    return f"dlsym and {len(found) - 1} of the driver's functions"


def check_harmless(preload: str) -> str:
    """A program that has nothing to do with CUDA notices nothing."""
    said = output("/bin/true", LD_PRELOAD=preload)
    assert said == "", f"/bin/true said: {said}"
    echoed = output("/bin/sh", "-c", "/bin/sh -c 'echo $((6 * 7))'", LD_PRELOAD=preload)
    assert echoed == "42\n", echoed
    return "silent in /bin/true and in a shell's children"


def main() -> int:
    library, driver, stand_in, header = (Path(argument).resolve() for argument in sys.argv[1:5])
    checks: list[tuple[str, Callable[[], str]]] = [
        ("library needs", lambda: check_needed(library)),
        ("driver hooks need", lambda: check_needed(driver)),
        ("stand-in needs", lambda: check_needed(stand_in)),
        ("exports", lambda: check_exports(library, header)),
        ("header", lambda: check_header(header)),
        ("driver hooks", lambda: check_driver(driver)),
        ("harmless", lambda: check_harmless(f"{library}")),
        ("driver hooks harmless", lambda: check_harmless(f"{driver} {library}")),
    ]
    failed = 0
    for name, check in checks:
        try:
            print(f"ok      {name}: {check()}")
        except (AssertionError, OSError) as error:
            failed += 1
            print(f"FAILED  {name}: {error}")
    print(f"{len(checks) - failed} passed, {failed} failed in 0s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
