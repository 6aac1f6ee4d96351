"""sire.torchtools on the software device: probes that say what was needed."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import signal
import subprocess
import sys
import time
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ledgers
import pytest
import sire
import torch
from ledgers import MIB, tensor
from running import until
from sire import torchtools
from sire.torchtools import _fresh, _measure


@pytest.fixture(autouse=True)
def locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Locks of this test's own."""
    yield from ledgers.fresh(monkeypatch, tmp_path)


def needs(size: int, tag: str | None = None) -> None:
    """A probe."""
    if tag is None:
        kept = tensor(size)
    else:
        with sire.region(tag):
            kept = tensor(size)
    del kept
    torch.cuda.empty_cache()


def fails() -> None:
    """A probe that meets an error."""
    raise LookupError("no such model")


def hangs() -> None:
    """A probe that does not end."""
    time.sleep(600)


def dies() -> None:
    """A probe that is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_probe_reports_the_peak_and_the_tags(tmp_path: Path) -> None:
    arguments = (needs, (100 * MIB,), {"tag": "weights"})
    report = torchtools.probe(*arguments, timeout=240, cache=tmp_path / "probes")
    assert 100 * MIB <= report.peak_bytes < 140 * MIB
    assert 100 * MIB <= report.tags["weights"] < 140 * MIB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchtools.gpu_scheduler, "_run", None)
        again = torchtools.estimate_gpu_usage_by_probe(*arguments, cache=tmp_path / "probes")
    assert again == report.peak_bytes, "it was known"


class Odd:
    """Shows where it lies, and not what it is."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self) -> None:
        """A probe."""


def test_a_probe_is_known_by_what_it_is() -> None:
    described = torchtools.gpu_scheduler._described
    same: list[Callable[[], object]] = [
        lambda: torch.nn.Linear(4, 4),
        lambda: Odd(3),
        lambda: Odd(3).run,
        lambda: functools.partial(needs, Odd(3)),
        lambda: [Odd(3), {"a": torch.nn.Linear(2, 2)}],
    ]
    other: list[object] = [
        torch.nn.Linear(4, 4, dtype=torch.float64),
        Odd(4),
        Odd(4).run,
        functools.partial(needs, Odd(4)),
        [Odd(3), {"a": torch.nn.Linear(2, 2, dtype=torch.float16)}],
    ]
    for make, another in zip(same, other, strict=True):
        kept = make()
        assert described(kept) == described(make()), "of another process it would be another"
        assert described(kept) != described(another)
        assert " at 0x" not in described(kept)


def takes_from_the_driver(size: int) -> None:
    """A probe with memory that PyTorch knows nothing of, until it has been looked at."""
    looks: list[None] = []
    look = _measure._Watcher._look

    def noted(watcher: _measure._Watcher) -> None:
        look(watcher)
        looks.append(None)

    _measure._Watcher._look = noted  # type: ignore[method-assign]
    maps = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    driver = ctypes.CDLL(next(path for path in maps if "libcuda.so" in path or "libsire_sim_cuda" in path))
    address = ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0
    # The first one may have begun before.
    before = len(looks)
    until("it was looked at", lambda: len(looks) >= before + 2)
    assert driver.cuMemFree_v2(address) == 0


def test_a_probe_sees_what_libraries_have_beside_pytorch() -> None:
    report = torchtools.probe(takes_from_the_driver, (64 * MIB,), timeout=240)
    assert 64 * MIB <= report.peak_bytes < 100 * MIB
    assert report.torch_peak_bytes < 8 * MIB


def test_a_probe_does_not_wait_for_its_turn_without_end(tmp_path: Path) -> None:
    """Whoever held the lock, of whatever user, kept all probes of the machine waiting for as long as he liked."""
    file = tmp_path / f"sire-probe-{torch.cuda.get_device_properties(0).uuid}.lock"
    with file.open("w") as hostile:
        fcntl.flock(hostile, fcntl.LOCK_EX)
        with pytest.raises(sire.ProbeTimeoutError, match=rf"within 0\.5 s.* holds the lock {file.name}"):
            torchtools.probe(needs, (MIB,), timeout=0.05)


@pytest.mark.parametrize(("probe_fn", "says"), [(fails, "no such model"), (dies, "signal 9"), (hangs, r"0\.5 s")])
def test_what_goes_wrong_in_a_probe_is_told(probe_fn: Callable[[], None], says: str) -> None:
    with pytest.raises(sire.ProbeError, match=says) as raised:
        torchtools.estimate_gpu_usage_by_probe(probe_fn, timeout=0.5 if probe_fn is hangs else 240)
    assert isinstance(raised.value, TimeoutError) == (probe_fn is hangs)


OWN_MODEL = """
import torch
from sire import torchtools

class Own(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

print(torchtools.probe(torchtools.make_probe_fn(Own, input_shape=(2, 8)), timeout=240).peak_bytes > 0)
"""


@pytest.mark.parametrize("command", [["train.py"], ["-m", "train"]])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_probe_made_of_the_programs_own_file_needs_one_that_can_be_imported(
    command: list[str], guarded: bool, tmp_path: Path
) -> None:
    guard = "if __name__ == '__main__':\n    print("
    (tmp_path / "train.py").write_text(OWN_MODEL.replace("print(", guard) if guarded else OWN_MODEL)
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    if guarded:
        assert done.stdout == "True\n", done.stderr
    else:
        end = done.stderr.splitlines()[-1]
        assert "ended with status 1 before it was done (standard error says why)" in end
        assert "call it under if __name__ == '__main__':" in end
        assert "this process runs the program's file again for a probe" in done.stderr


def test_only_what_the_programs_own_file_defines_makes_it_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        """Like one of the program's file."""

    for where, found in (("elsewhere", False), ("__main__", True)):
        monkeypatch.setattr(Own, "__module__", where)
        Own.__qualname__ = "Own"
        monkeypatch.setattr(sys.modules["__main__"], "Own", Own, raising=False)
        monkeypatch.setitem(sys.modules, "elsewhere", sys.modules["__main__"])
        assert _fresh.mentions_program((needs, (torch.zeros(1 << 20), [{"deep": (Own(),)}]), {})) is found
        assert _fresh.mentions_program(functools.partial(needs, Own)) is found
    # What cannot be sent is for whoever sends it to refuse.
    assert _fresh.mentions_program(lambda: None)


def test_an_estimate_without_running_is_a_lower_bound() -> None:
    probe_fn = torchtools.make_probe_fn("torch.nn:Identity", input_shape=(1024, 1024))
    assert torchtools.estimate_without_running(probe_fn) == 4 * MIB
    linear = torchtools.make_probe_fn(_linear, input_shape=(64, 1024), forward_and_backward=True)
    # Weights and their gradients at least; and what is computed is nothing.
    assert 8 * MIB <= torchtools.estimate_without_running(linear) < 20 * MIB


class Pair(NamedTuple):
    """A batch."""

    one: torch.Tensor
    other: torch.Tensor


class Sum(torch.nn.Module):
    """Of a batch's parts, which must be on its device."""

    def __init__(self) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.ones(()))

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert one.device == other.device == self.by.device
        return one + other * self.by


@pytest.mark.parametrize(
    "batch",
    [
        Pair(torch.ones(2), torch.ones(2)),
        UserDict(one=torch.ones(2), other=torch.ones(2)),
        [torch.ones(2), torch.ones(2)],
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_may_be_a_named_tuple(batch: object) -> None:
    """It was made anew as if it took a list of its parts, which raised, or gave a batch with one part."""
    torchtools.make_probe_fn(Sum, sample_batch=batch, device="cuda", forward_and_backward=True)()


class Row(list[torch.Tensor]):
    """A list with a name."""


def test_a_batch_may_have_tables_and_lists_of_any_kind_in_it() -> None:
    table, row = UserDict(one=torch.ones(2)), Row([torch.ones(2)])

    class First(Sum):
        def forward(self, table: dict[str, torch.Tensor], row: Row) -> torch.Tensor:
            return super().forward(table["one"], row[0])

    torchtools.make_probe_fn(First, sample_batch=(table, row), device="cuda", forward_and_backward=True)()


def _linear() -> torch.nn.Module:
    return torch.nn.Linear(1024, 1024)
