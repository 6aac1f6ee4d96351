"""sire.torchtools on the software device: reservations that hold among processes, probes that say what was needed."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sire
import torch
from measure import on_software_device
from running import line, running, until
from sire import torchtools
from sire.torchtools import gpu_lock

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
        occupied = [tensor(160 * MIB)]
        assert before - free() == 220 * MIB, "our own came out of them"
        assert reservation.unused_bytes == 60 * MIB
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


def test_odd_sizes_leave_nothing_behind() -> None:
    """The naive twin: so many bytes in the ledger, so many whole granules behind the fence, one place for both."""
    before, granule, dice = free(), 2 * MIB, random.Random(7)  # noqa: S311
    with torchtools.reserve_gpu_for_training(0, 31 * MIB + 1, 0) as reservation:
        for _ in range(24):
            size = dice.randrange(1, 96 * MIB)
            reservation.resize(size)
            assert reservation.reserved_bytes == size
            assert [(each["bytes"], each["owned"]) for each in entries()] == [(size, size)]
            fenced = before - free()
            if reservation.fence == "stock":
                assert fenced == -(-size // granule) * granule
            else:
                # PyTorch's cache has segments of its own size.
                assert size <= fenced < size + 24 * MIB
    torch.cuda.empty_cache()
    assert (free(), entries()) == (before, [])


def test_what_hooks_take_out_of_the_fence_is_owned_before_and_after(preloaded: bool) -> None:
    """Odd pieces go through the driver; whoever looks at the ledger sees the same before and after."""
    with torchtools.reserve_gpu_for_training(0, 90 * MIB, 0) as reservation:
        for size in (30 * MIB, 7 * MIB, 1 * MIB):
            kept = tensor(size)
            assert [(each["bytes"], each["owned"]) for each in entries()] == [(90 * MIB, 90 * MIB)]
            del kept
            torch.cuda.empty_cache() if preloaded else None
            assert [(each["bytes"], each["owned"]) for each in entries()] == [(90 * MIB, 90 * MIB)]
        assert reservation.reserved_bytes == 90 * MIB


def test_strict_wants_the_bytes_themselves() -> None:
    with torchtools.reserve_gpu_for_training(0, 100 * MIB, 0, fence=False) as loose:
        assert loose.fence == "none"
        # The ledger would give more than the driver has: what is used without a reservation it does not know.
        with torchtools.reserve_gpu_for_training(0, 50 * MIB, 0, strict=True) as reservation:
            assert reservation.fence in ("stock", "cache")
            before, others = (reservation.reserved_bytes, free()), sorted(each["bytes"] for each in entries())
            with pytest.MonkeyPatch.context() as patch:
                broken(patch, reservation)
                with pytest.raises(sire.OutOfMemoryError):
                    reservation.resize(80 * MIB)
            torch.cuda.empty_cache() if reservation.fence == "stock" else None
            assert (reservation.reserved_bytes, sorted(each["bytes"] for each in entries())) == (before[0], others)
            reservation.resize(60 * MIB)
            assert reservation.reserved_bytes == 60 * MIB


def broken(patch: pytest.MonkeyPatch, reservation: torchtools.Reservation) -> None:
    """The driver has no more memory for fences, as if somebody who knows of no ledger had taken it."""

    def refuse(*_arguments: object) -> None:
        raise sire.OutOfMemoryError("somebody was faster")

    place = reservation._place
    assert place is not None
    name = "fill" if reservation.fence == "cache" else "resize"
    patch.setattr(place, name, refuse)


@pytest.mark.parametrize("kind", ["GPU", "MIG"])
def test_what_was_reserved_from_outside_is_given_without_waiting(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's UUID does not say of what it is, the command's, which is NVML's, does.
    name = f"{kind}-{torch.cuda.get_device_properties(0).uuid}"
    monkeypatch.setenv("SIRE_RESERVED", f"{name}:{100 * MIB}")
    with torchtools.reserve_gpu_for_training(0, 60 * MIB, 20 * MIB) as reservation:
        assert (reservation.reserved_bytes, reservation.fence, entries()) == (100 * MIB, "none", [])
        reservation.resize(90 * MIB)
        with pytest.raises(sire.UnsupportedError, match="give sire reserve --bytes more"):
            reservation.resize(101 * MIB)
    # More than that is a reservation of its own, and so is one of another GPU.
    with torchtools.reserve_gpu_for_training(0, 120 * MIB, 0, fence=False):
        assert [each["bytes"] for each in entries()] == [120 * MIB]
    monkeypatch.setenv("SIRE_RESERVED", f"GPU-another:{100 * MIB}")
    with torchtools.reserve_gpu_for_training(0, 60 * MIB, 0, fence=False):
        assert [each["bytes"] for each in entries()] == [60 * MIB]


def test_ctrl_c_ends_the_wait() -> None:
    total = torch.cuda.mem_get_info(0)[1]
    with torchtools.reserve_gpu_for_training(0, total // 2, 0, fence=False):

        def interrupt() -> None:
            until("it waits", lambda: "waiting" in [each["state"] for each in entries()])
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            torchtools.reserve_gpu_for_training(0, total * 3 // 4, 0).__enter__()
        thread.join(60)
        assert [each["state"] for each in entries()] == ["holding"]


def test_without_the_library_a_lock_keeps_others_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> None:
        raise sire.LibraryNotFoundError("there is no library")

    monkeypatch.setattr(gpu_lock._library, "load", missing)
    # Every other one fails: that of the second is held by the first.
    for fence in (True, False):
        with pytest.warns(torchtools.ReservationWarning, match="nothing of it is reserved: there is no library"):
            first = torchtools.reserve_gpu_for_training(0, 10 * MIB, 0, fence=fence).__enter__()
        assert (first.reserved_bytes, first.fence) == (0, "none")
        assert list(tmp_path.glob("torchtools_gpu_lock_*.lock"))
        with (
            pytest.warns(torchtools.ReservationWarning),
            pytest.raises(sire.ReservationTimeoutError, match="another process holds the lock"),
        ):
            torchtools.reserve_gpu_for_training(0, 10 * MIB, 0, blocking=False, fence=fence).__enter__()
        first.resize(20 * MIB)
        first.release()
    with pytest.raises(sire.LibraryNotFoundError):
        torchtools.reserve_gpu_for_training(0, 10 * MIB, 0, strict=True).__enter__()


WITHOUT_CUDA = """
import sys
import sire.compat
sire.compat.enable()
import torch
from torchtools import get_device_from_env, probe, reserve_gpu_for_training, run_training_with_reservation
import torchtools
assert torchtools.__name__ == "sire.torchtools" or torchtools is sys.modules["sire.torchtools"]
assert not torch.cuda.is_available()
with reserve_gpu_for_training(0, 1 << 40) as reservation:
    assert (reservation.device_index, reservation.reserved_bytes, reservation.unused_bytes) == (None, 0, 0)
    assert reservation.fence == "none"
    reservation.resize(1 << 41)
assert probe(print, ("not run",)).peak_bytes == 0
assert run_training_with_reservation(lambda x: x + 1, (4,), probe_fn=print) == 5
assert get_device_from_env().type == "cpu"
torch.backends.mps.is_available = lambda: True
print(get_device_from_env().type)
"""


def test_without_cuda_everything_runs_and_nothing_is_reserved() -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "SIRE_HOOK_MODE")}
    variables["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", WITHOUT_CUDA]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stdout.strip()) == (0, "mps"), done.stderr


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


TWO_DEVICES = """
import sire, torch
from sire import torchtools as t
from sire.torchtools import _nvml
total = torch.cuda.mem_get_info(0)[1]
for device in (0, 1):
    try:
        with t.reserve_gpu_for_training(device, total // 2, 0, timeout=0.2, fence=False):
            print("had")
    except sire.ReservationTimeoutError:
        print("missed")
print(t.select_device(total // 2).index)
busy = str(torch.cuda.get_device_properties(0).uuid)
_nvml.load = lambda uuid: 90 if busy in uuid else 5
print(t.select_device(1 << 20, candidates=[1]).index, t.select_device(total // 8).index)
"""


def test_two_devices_are_known_by_what_they_are_and_not_by_their_numbers() -> None:
    if not on_software_device():
        pytest.skip("there may be one device only")
    total = torch.cuda.mem_get_info(0)[1]
    two = {"SIRE_SIM_DEVICES": "2"}

    def other() -> list[str]:
        """What a process makes of both, in their own order."""
        command = [sys.executable, "-c", TWO_DEVICES]
        done = subprocess.run(command, env=os.environ | two, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    # Its first is the others' second.
    with holder(total * 3 // 4, CUDA_VISIBLE_DEVICES="1,0", **two):
        assert other() == ["had", "missed", "0", "1", "0"]
    # With as much room on both, the load decides.
    assert other() == ["had", "had", "0", "1", "1"]


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
