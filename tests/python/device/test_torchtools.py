"""sire.torchtools on the software device: reservations that hold among processes, probes that say what was needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sire
import torch
from running import line, running, until
from sire import torchtools

MIB = 1024**2
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Ledgers of this test's own; every warning is an error."""
    monkeypatch.setenv("TORCHTOOLS_LOCK_DIR", str(tmp_path))
    torch.cuda.init()
    torch.cuda.empty_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def free() -> int:
    """Bytes of the device that the driver could give to anybody."""
    return int(torch.cuda.mem_get_info(0)[0])


def entries() -> list[dict[str, int]]:
    """Who is in the ledger."""
    found: list[dict[str, int]] = sire._library.load().reservations(0)["entries"]
    return found


def tensor(size: int) -> torch.Tensor:
    """So many bytes."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def test_the_reserved_bytes_are_ours_and_our_allocations_use_them() -> None:
    before = free()
    with torchtools.reserve_gpu_for_training(0, 200 * MIB, 20 * MIB) as reservation:
        assert reservation.reserved_bytes == 220 * MIB
        assert reservation.fence in ("stock", "cache")
        assert before - free() == 220 * MIB, "nobody else can have them"
        occupied = [tensor(150 * MIB)]
        assert before - free() == 220 * MIB, "our own came out of them"
        assert reservation.unused_bytes == 70 * MIB
        assert [(each["bytes"], each["owned"]) for each in entries()] == [(220 * MIB, 220 * MIB)]
        del occupied
    torch.cuda.empty_cache()
    assert free() == before
    assert entries() == []


def test_a_low_estimate_does_not_run_into_its_own_fence() -> None:
    with torchtools.reserve_gpu_for_training(0, 100 * MIB, 0):
        # Nearly all of the device, which holds the fence as well.
        kept = tensor(torch.cuda.mem_get_info(0)[1] - 64 * MIB)
        assert int(kept[:4096].fill_(1).sum()) == 4096
        del kept


def test_it_grows_and_shrinks_and_ends_whatever_is_raised() -> None:
    before = free()
    managers = torchtools.reserve_gpu_for_training(0, 100 * MIB, 0)
    with pytest.raises(KeyError), managers as reservation:
        reservation.resize(300 * MIB)
        assert (reservation.reserved_bytes, before - free()) == (300 * MIB, 300 * MIB)
        reservation.resize(50 * MIB)
        assert (reservation.reserved_bytes, before - free()) == (50 * MIB, 50 * MIB)
        with pytest.raises(sire.OutOfMemoryError):
            reservation.resize(1 << 50)
        assert reservation.reserved_bytes == 50 * MIB
        with managers as other:
            assert sorted(each["bytes"] for each in entries()) == [50 * MIB, 100 * MIB]
        assert other.reserved_bytes == 0
        raise KeyError
    reservation.release()
    torch.cuda.empty_cache()
    assert (free(), entries()) == (before, [])


def test_without_a_fence_the_ledger_keeps_the_bytes() -> None:
    before = free()
    with torchtools.reserve_gpu_for_training(0, 200 * MIB, 0, fence=False) as reservation:
        assert (free(), reservation.fence) == (before, "none")
        begun = time.monotonic()
        with pytest.raises(sire.ReservationTimeoutError, match="bytes are missing"):
            torchtools.reserve_gpu_for_training(0, before - 100 * MIB, 0, timeout=0.2).__enter__()
        assert 0.2 <= time.monotonic() - begun < 60, "a time-out that is none"
        with pytest.raises(TimeoutError):
            torchtools.reserve_gpu_for_training(0, before, 0, blocking=False).__enter__()
        # What is used of it is not counted twice.
        kept = tensor(200 * MIB)
        until("what is used is noted", lambda: sum(each["owned"] for each in entries()) >= 200 * MIB)
        with torchtools.reserve_gpu_for_training(0, free(), 0, timeout=0):
            pass
        del kept


def test_a_gpu_for_oneself_is_for_oneself() -> None:
    with torchtools.reserve_gpu_for_training(safety_margin_bytes=64 * MIB) as reservation:
        assert 0 <= free() - 64 * MIB < 2 * MIB
        with pytest.raises(sire.InvalidArgumentError, match="already"):
            torchtools.reserve_gpu_for_training().__enter__()
        with pytest.raises(sire.ReservationTimeoutError):
            torchtools.reserve_gpu_for_training(0, 100 * MIB, blocking=False).__enter__()
        assert reservation.reserved_bytes > 0


@pytest.mark.parametrize(
    "arguments", [{"training_reserved_bytes": -1}, {"safety_margin_bytes": 1.5}, {"timeout": float("nan")}, {"gpu": 7}]
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(sire.InvalidArgumentError):
        torchtools.reserve_gpu_for_training(**arguments).__enter__()  # type: ignore[arg-type]


# --- other processes -------------------------------------------------------------------------------------

# Without a fence, so that the ledger is all that others see of it: their device may be another one here.
HOLD = """
import sys, time
import sire.torchtools as t
with t.reserve_gpu_for_training(0, int(sys.argv[1]), 0, timeout=200, fence=False) as reservation:
    print(reservation.reserved_bytes, flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(size: int, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds so many bytes."""
    command = [sys.executable, "-c", HOLD, str(size)]
    with running(command, stdout=subprocess.PIPE, env={**os.environ, **environment}) as child:
        assert line(child) == str(size)
        yield child


def test_a_stopped_process_keeps_its_reservation_and_a_killed_one_loses_it() -> None:
    total = torch.cuda.mem_get_info(0)[1]
    # Another number for the same device: what counts is the device.
    name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    with holder(total * 3 // 4, CUDA_VISIBLE_DEVICES=name) as child:
        wanted = torchtools.reserve_gpu_for_training(0, total // 2, 0, timeout=0.1)
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(sire.ReservationTimeoutError):
            wanted.__enter__()
    with torchtools.reserve_gpu_for_training(0, total // 2, 0, timeout=60) as reservation:
        assert reservation.reserved_bytes == total // 2


# --- probes ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("probe_fn", "says"), [(fails, "no such model"), (dies, "signal 9"), (hangs, r"0\.5 s")])
def test_what_goes_wrong_in_a_probe_is_told(probe_fn: Callable[[], None], says: str) -> None:
    with pytest.raises(sire.ProbeError, match=says) as raised:
        torchtools.estimate_gpu_usage_by_probe(probe_fn, timeout=0.5 if probe_fn is hangs else 240)
    assert isinstance(raised.value, TimeoutError) == (probe_fn is hangs)


def test_an_estimate_without_running_is_a_lower_bound() -> None:
    probe_fn = torchtools.make_probe_fn("torch.nn:Identity", input_shape=(1024, 1024))
    assert torchtools.estimate_without_running(probe_fn) == 4 * MIB
    linear = torchtools.make_probe_fn(_linear, input_shape=(64, 1024), forward_and_backward=True)
    # Weights and their gradients at least; and what is computed is nothing.
    assert 8 * MIB <= torchtools.estimate_without_running(linear) < 20 * MIB


def _linear() -> torch.nn.Module:
    return torch.nn.Linear(1024, 1024)


def test_the_example_runs_beside_another_reservation(tmp_path: Path) -> None:
    with torchtools.reserve_gpu_for_training(0, 100 * MIB, 0):
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "run_with_reservation_example.py")],
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
    assert "step 4: loss" in done.stdout
    assert "64 MiB reserved, behind the fence of kind" in done.stdout


def test_devices_are_chosen_by_environment_and_by_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchtools.get_device_from_env() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert torchtools.get_device_from_env() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(RuntimeError, match="LOCAL_RANK is 3"):
        torchtools.get_device_from_env()
    monkeypatch.delenv("LOCAL_RANK")
    assert torchtools.select_device(100 * MIB) == torch.device("cuda", 0)
    with torchtools.reserve_gpu_for_training(0, free() - 200 * MIB, 0, fence=False), pytest.raises(sire.SireError):
        torchtools.select_device(300 * MIB)
