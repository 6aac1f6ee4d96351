"""Memory that is short, as PyTorch's whole-process allocator must hear of it: by a C++ exception."""

from __future__ import annotations

import pytest
from conftest import FIXTURES, Workshop, check


@pytest.mark.parametrize("runtime", ["c10", "c10 before 2.15", "std"])
def test_the_allocator_raises(workshop: Workshop, runtime: str) -> None:
    program = workshop.program("exceptions.cpp")
    folders = [workshop.link_runtime.parent]
    if runtime.startswith("c10"):
        older = ["-DOLDER"] if "before" in runtime else []
        options = ["-shared", "-fPIC", "-Wl,-soname,libc10.so", *older]
        library = workshop.fixture("libc10.so", FIXTURES / "c10.cpp", *options, subdirectory=runtime.replace(" ", "-"))
        folders.append(library.parent)
    check(workshop.run(program, runtime[:3], folders=tuple(folders), preload=False))
