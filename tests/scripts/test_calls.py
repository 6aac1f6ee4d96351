"""How scripts are called: from any folder, with --help, with an option that does not exist, and with names of files. Nothing is built here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAMES = ["api-reference", "bench", "build", "check-aarch64", "demo", "fuzz", "gpu-bundle", "gpu-suite", "lint", "test", "wheel"]
# What answers in Python: it needs one that works. The others meet one that does nothing.
IN_PYTHON = ["bench", "gpu-suite"]


class Caller:
    """A folder from which scripts are called. The tools that they would start are others there, which leave a mark."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, tools = folder, folder / "started", folder / "tools"
        tools.mkdir()
        for name in ("cargo", "rustc", "tool"):
            (tools / name).write_text(f'#!/bin/sh\necho "$0" >>{self.mark}\n{TOOL}')
            (tools / name).chmod(0o755)
        tool = str(tools / "tool")
        own = {"SIRE_TEST_PYTHON": tool, "SIRE_BUILD_DOC_PYTHON": tool, "SIRE_DEMO_PYTHON": tool, "CARGO_TARGET_DIR": str(folder / "target")}
        self.environment = {**os.environ, **own, "PATH": f"{tools}:{os.environ['PATH']}"}

    def call(self, name: str, *arguments: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
        if name in IN_PYTHON:
            self.environment["SIRE_TEST_PYTHON"] = sys.executable
        place = where or self.folder
        script = os.path.relpath(SCRIPTS / name, place)
        told = [script if "/" in script else f"./{script}", *arguments]
        return subprocess.run(told, cwd=place, env=self.environment, capture_output=True, text=True, timeout=120, check=False)


# Says what it is told, and makes the wheel that is wanted of it.
TOOL = """\
echo "$@"
while [ $# -gt 0 ]; do
    if [ "$1" = --wheel-dir ]; then : >"$2/sire.whl"; fi
    shift
done
"""


@pytest.fixture
def caller(tmp_path: Path) -> Caller:
    return Caller(tmp_path)


def test_every_script_is_among_them() -> None:
    assert sorted(each.name for each in SCRIPTS.iterdir() if each.is_file()) == NAMES


@pytest.mark.parametrize("where", [SCRIPTS, SCRIPTS.parent, None], ids=["scripts", "checkout", "elsewhere"])
@pytest.mark.parametrize("name", NAMES)
def test_help_is_help_wherever_one_is(caller: Caller, name: str, where: Path | None) -> None:
    """From a folder other than the checkout's, the script did not find itself, and its whole work began."""
    done = caller.call(name, "--help", where=where)
    assert (done.returncode, f"scripts/{name}" in done.stdout, done.stderr) == (0, True, "")
    assert not caller.mark.exists()


@pytest.mark.parametrize("where", [SCRIPTS, SCRIPTS.parent], ids=["scripts", "checkout"])
# The benchmarks build before they read what is asked of them.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bench"])
def test_an_option_that_does_not_exist_ends_the_script(caller: Caller, name: str, where: Path) -> None:
    done = caller.call(name, "--no-such-option", where=where)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"scripts/{name}" in done.stderr or f"{name}: error" in done.stderr
    assert not caller.mark.exists()


def test_names_of_files_are_the_callers(caller: Caller) -> None:
    """They were the checkout's."""
    demo = caller.call("demo", "--device", "cuda", "--json", "figures.json")
    assert f"--json {caller.folder}/figures.json" in demo.stdout, demo
    reference = caller.call("api-reference", "pages")
    assert reference.stdout.rstrip().endswith(f" {caller.folder}/pages"), reference
    wheel = caller.call("wheel", "--out", "wheels")
    assert [each.name for each in (caller.folder / "wheels").iterdir()] == ["sire.whl"], wheel
    # It makes the folder, and misses the products there.
    caller.call("gpu-bundle", "bundle")
    assert (caller.folder / "bundle").is_dir()
