"""Environments that cannot be served: refused where a region begins, with the reason, never ignored."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import sire
import torch
from measure import driver_of_software_device, is_gone_at_once

MAKE = """
import sire, torch
def attempt():
    try:
        with sire.region('a', backup='cpu'):
            t = torch.full((1 << 22,), 3, dtype=torch.uint8, device='cuda')
        with sire.paused('a'): pass
        print('served', bool((t == 3).all()))
    except sire.SireError as error:
        print(type(error).__name__, error.status, error, sep=': ')
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", MAKE + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("version", ["2.8.0+cu128", "1.13.0", "nonsense"])
def test_other_versions_of_pytorch_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with (
        pytest.raises(sire.UnsupportedError, match=r"knows the allocators of 2\.9 and newer. Install torch >= 2\.9"),
        sire.region("version"),
    ):
        pytest.fail("entered")


def test_pytorch_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(sire.UnsupportedError, match="built without CUDA"), sire.region("cpu only"):
        pytest.fail("entered")


def test_pytorch_first_used_inside_a_region_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    if (driver := driver_of_software_device()) is not None:
        # Found by PyTorch's own search path only, and PyTorch comes late here.
        monkeypatch.setenv("SIRE_LIBCUDA", driver)
    code = """
import sire
try:
    with sire.region('late'):
        import torch
        torch.ones(1, device='cuda')
except sire.UnsupportedError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert "Import torch before the first region" in done.stdout


def test_preload_mode_without_preload_is_refused() -> None:
    environment = {"SIRE_HOOK_MODE": "preload", "LD_PRELOAD": ""}
    assert "was not preloaded" in run("attempt()", **environment)


def test_a_forked_child_is_refused() -> None:
    code = """
import os
attempt()
child = os.fork()
if child == 0:
    try:
        sire.pause()
        print('paused')
    except sire.SireError as error:
        print(type(error).__name__)
    os._exit(0) if not __import__('sys').stdout.flush() else None
os.waitpid(child, 0)
attempt()
"""
    assert run(code).split() == ["served", "True", "InactiveError", "served", "True"]


def test_disabled_hooks_make_regions_pass_through() -> None:
    said = run("attempt()", SIRE_DISABLE="1")
    assert said.startswith(("served", "InactiveError"))


# Before PyTorch is there, or without what the call works on: which call, and what it says.
TOO_EARLY = {
    "with sire.checked(): pass": "checked looks at PyTorch's operations: import torch first",
    "with sire.cuda_graph(object()): pass": "cuda_graph captures a torch.cuda.CUDAGraph: import torch first",
    "sys.modules['torch'] = None; sire.use_allocator()": "use_allocator() needs PyTorch, which cannot be imported",
    "import torch; sire.distributed.pause('a')": "call torch.distributed.init_process_group on every rank first",
    "import torch; sire.distributed.suspend_nccl()": "torch.distributed",
}


def test_what_comes_too_early_is_refused() -> None:
    lines = "".join(f"attempt({call!r})\n" for call in TOO_EARLY)
    code = f"""
import os, sire, sys
def attempt(call):
    try:
        exec(call)
        print('done')
    except sire.UnsupportedError as error:
        print(error)
    finally:
        if sys.modules.get('torch', 0) is None:
            del sys.modules['torch']
{lines}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for said, words in zip(done.stdout.splitlines(), TOO_EARLY.values(), strict=True):
        assert words in said


def out_of_memory() -> None:
    sire.resume("kept/away")


def out_of_memory_behind() -> None:
    sire.resume("kept/away", non_blocking=True).wait()


def out_of_memory_inside() -> None:
    with sire.paused("kept/away"):
        pass


def no_such_tag() -> None:
    sire.pause("kept/nothing")


def no_such_switch() -> None:
    sire.switch(pause="kept/nothing", resume="kept/away")


@pytest.mark.parametrize(
    "failing", [out_of_memory, out_of_memory_behind, out_of_memory_inside, no_such_tag, no_such_switch]
)
def test_a_failure_keeps_no_tensors(failing: Callable[[], None]) -> None:
    """A frame that raised an error which it had in a variable, and the error, held each other, and with them the
    tensors in all callers' variables, until garbage was collected: after an `OutOfMemoryError` the device stayed full.
    """
    sire.empty_cache()
    size = torch.cuda.mem_get_info()[0] // 3 * 2
    with sire.region("kept/away"):
        away = torch.empty(size, dtype=torch.uint8, device="cuda")
    sire.pause("kept/away")
    inside = torch.empty(size, dtype=torch.uint8, device="cuda")

    def calls() -> weakref.ref[torch.Tensor]:
        own = torch.ones(4, device="cuda")
        with pytest.raises(sire.SireError):
            failing()
        return weakref.ref(own)

    assert is_gone_at_once(calls)
    del inside, away
    torch.cuda.empty_cache()
