"""sire.torchtools on the software device: reservations that hold among processes."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ledgers
import pytest
import sire
import torch
from ledgers import MIB, tensor
from measure import on_software_device
from running import line, running, until
from sire import torchtools

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Ledgers of this test's own."""
    yield from ledgers.fresh(monkeypatch, tmp_path)


def free() -> int:
    """Bytes of the device that the driver could give to anybody."""
    return int(torch.cuda.mem_get_info(0)[0])


def entries() -> list[dict[str, int]]:
    """Who is in the ledger."""
    found: list[dict[str, int]] = sire._library.load().reservations(0)["entries"]
    return found


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


def test_what_is_freed_by_a_stream_is_not_owned_before_it_is_back() -> None:
    before, runtime, place = free(), ctypes.CDLL(None), ctypes.c_void_p()
    with torchtools.reserve_gpu_for_training(0, 90 * MIB, 0):
        if hasattr(runtime, "cudaMalloc"):
            # The hooks' own. The driver takes the memory back when the stream gets there, and nobody is told.
            assert runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(40 * MIB)) == 0
            assert runtime.cudaFreeAsync(place, None) == 0
            torch.cuda.synchronize()
        (entry,) = entries()
        assert entry["bytes"] == 90 * MIB
        assert entry["owned"] <= before - free(), "others would be given what the driver has given away"
        kept = tensor(80 * MIB)
        assert entries()[0]["owned"] <= before - free()
        del kept
    torch.cuda.empty_cache()
    assert (free(), entries()) == (before, [])


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


@pytest.mark.skipif(os.environ.get("SIRE_TEST_MODE") != "torch", reason="runs in hook mode torch")
def test_what_pytorchs_cache_gives_back_is_not_owned_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fence of PyTorch's cache is given back whole when the reservation shrinks, and taken again. It counted as owned
    meanwhile, and others took the bytes for free ones. One that could not grow did not come back at all.
    """
    plain, seen = torch.cuda.empty_cache, []

    def empty_cache() -> None:
        seen.append((sum(each["owned"] for each in entries()), free()))
        plain()

    with torchtools.reserve_gpu_for_training(0, 100 * MIB, 0, strict=True) as reservation:
        assert reservation.fence == "cache"
        fenced = free()
        monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
        reservation.resize(80 * MIB)
        assert seen == [(0, fenced)]
        before = free(), sorted((each["bytes"], each["owned"]) for each in entries())
        place = reservation._place
        assert place is not None
        with pytest.MonkeyPatch.context() as patch, pytest.raises(sire.OutOfMemoryError):
            fill = place.fill  # type: ignore[attr-defined]
            outcomes = iter((refuse, fill))
            patch.setattr(place, "fill", lambda: next(outcomes)())
            reservation.resize(120 * MIB)
        assert (free(), sorted((each["bytes"], each["owned"]) for each in entries())) == before


def refuse(*_arguments: object) -> None:
    raise sire.OutOfMemoryError("somebody was faster")


def broken(patch: pytest.MonkeyPatch, reservation: torchtools.Reservation) -> None:
    """The driver has no more memory for fences, as if somebody who knows of no ledger had taken it."""
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
        assert (reservation.reserved_bytes, reservation.fence, entries()) == (80 * MIB, "none", [])
        reservation.resize(90 * MIB)
        with pytest.raises(sire.UnsupportedError, match="give sire reserve --bytes more"):
            reservation.resize(101 * MIB)
        assert reservation.reserved_bytes == 90 * MIB
    # More than that is a reservation of its own, and so is one of another GPU.
    with torchtools.reserve_gpu_for_training(0, 120 * MIB, 0, fence=False):
        assert [each["bytes"] for each in entries()] == [120 * MIB]
    monkeypatch.setenv("SIRE_RESERVED", f"GPU-another:{100 * MIB}")
    with torchtools.reserve_gpu_for_training(0, 60 * MIB, 0, fence=False):
        assert [each["bytes"] for each in entries()] == [60 * MIB]


def given(size: int) -> torchtools.ReserveGpu:
    """A reservation without a fence, so that only the ledger tells whether it is one of its own."""
    return torchtools.reserve_gpu_for_training(0, size, 0, fence=False)


def test_what_was_reserved_from_outside_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 80 MiB, one inside the other, both had the 100 MiB of the command."""
    monkeypatch.setenv("SIRE_RESERVED", f"{torch.cuda.get_device_properties(0).uuid}:{100 * MIB}")
    for _ in range(2):
        with given(80 * MIB) as outer:
            with given(80 * MIB):
                assert [each["bytes"] for each in entries()] == [80 * MIB], "waited for like any other"
            with given(15 * MIB):
                assert entries() == []
                outer.resize(85 * MIB)
                with pytest.raises(sire.UnsupportedError, match="of which 0 are left"):
                    outer.resize(86 * MIB)
                with given(MIB):
                    assert [each["bytes"] for each in entries()] == [MIB]
            with pytest.raises(sire.InvalidArgumentError, match="already"):
                given(0).__enter__()
        # All of it is there again.
    with given(0) as whole:
        assert (whole.reserved_bytes, entries()) == (100 * MIB, [])


def test_the_margin_comes_out_of_what_was_reserved_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIRE_RESERVED", f"{torch.cuda.get_device_properties(0).uuid}:{100 * MIB}")
    with torchtools.reserve_gpu_for_training(0, 60 * MIB, 30 * MIB) as reservation:
        assert reservation.reserved_bytes == 90 * MIB
        with given(11 * MIB):
            assert [each["bytes"] for each in entries()] == [11 * MIB], "the margin was promised to the other"
    # Whoever gives the command and the function the same number waits for nobody, and is told what is missing.
    with pytest.warns(torchtools.ReservationWarning, match=f"margin of {10 * MIB} bytes instead of {50 * MIB}") as told:
        short = torchtools.reserve_gpu_for_training(0, 90 * MIB).__enter__()
    assert [each.filename for each in told] == [__file__]
    assert (short.reserved_bytes, entries()) == (100 * MIB, [])
    short.release()


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


def test_where_the_bytes_cannot_be_had_the_ledger_keeps_them_and_it_is_said() -> None:
    if not on_software_device():
        pytest.skip("only the software device can be asked, or made to fail")
    wanted = torchtools.reserve_gpu_for_training(0, 40 * MIB, 0)
    why = "no fence: its bytes could not be taken from the driver"
    with refused("cuMemCreate", "cudaMalloc"), pytest.warns(torchtools.ReservationWarning, match=why) as told:
        reservation = wanted.__enter__()
    assert [each.filename for each in told] == [__file__], "where it was asked for"
    assert (reservation.fence, reservation.reserved_bytes, reservation.unused_bytes) == ("none", 40 * MIB, 0)
    assert [(each["state"], each["bytes"], each["owned"]) for each in entries()] == [("holding", 40 * MIB, 0)]
    # What is used of it is noted, as without a fence.
    kept = tensor(30 * MIB)
    until("what is used is noted", lambda: entries()[0]["owned"] >= 30 * MIB)
    del kept
    with refused("cuMemCreate", "cudaMalloc"), pytest.raises(sire.OutOfMemoryError):
        torchtools.reserve_gpu_for_training(0, 40 * MIB, 0, strict=True).__enter__()
    assert [each["bytes"] for each in entries()] == [40 * MIB], "nothing is left of what was refused"
    reservation.release()
    assert entries() == []


@contextmanager
def refused(*functions: str) -> Iterator[None]:
    """The software device's driver has no memory."""
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    assert runtime.sire_sim_fault("; ".join(f"{each}=error:2" for each in functions).encode()) == 0
    try:
        yield
    finally:
        runtime.sire_sim_fault(b"")


REQUIRED = inspect.Parameter.empty

# What the documents of the package torchtools say: arguments in their order, with their defaults (...: any).
DOCUMENTED: dict[str, dict[str, object]] = {
    "get_device_from_env": {},
    "reserve_gpu_for_training": {
        "gpu": None,
        "training_reserved_bytes": 0,
        "safety_margin_bytes": 50 * MIB,
        "blocking": True,
        "timeout": None,
        "fence": True,
    },
    "estimate_gpu_usage_by_probe": {"probe_fn": REQUIRED, "args": (), "kwargs": None, "gpu": None, "timeout": 60.0},
    "make_probe_fn": {
        "model_ctor": None,
        "input_shape": None,
        "sample_batch": None,
        "device": None,
        "forward_and_backward": False,
        "warmup_steps": 1,
    },
    "run_training_with_reservation": {
        "train_fn": REQUIRED,
        "train_args": (),
        "train_kwargs": None,
        "probe_fn": ...,
        "probe_args": ...,
        "probe_kwargs": ...,
        "gpu": ...,
        "countdown": ...,
        "reserve_kwargs": ...,
        "probe_timeout": 60.0,
    },
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_functions_take_what_is_documented(name: str) -> None:
    taken = list(inspect.signature(getattr(torchtools, name)).parameters.values())
    documented = DOCUMENTED[name]
    assert [each.name for each in taken[: len(documented)]] == list(documented)
    for each in taken:
        wanted = documented.get(each.name, ...)
        # More may be added, if it need not be given.
        assert each.default is not REQUIRED if wanted is ... else each.default == wanted, each
        named_only = name == "run_training_with_reservation" and taken.index(each) >= 3
        assert each.name not in documented or (each.kind is each.KEYWORD_ONLY) == named_only, each


WITHOUT_CUDA = """
import sys
import sire.compat
sire.compat.enable()
import torch
from torchtools import get_device_from_env, probe, reserve_gpu_for_training, run_training_with_reservation
import torchtools
assert torchtools.__name__ == "sire.torchtools" or torchtools is sys.modules["sire.torchtools"]
assert not torch.cuda.is_available()
assert get_device_from_env().type == "cpu"
# As on a Mac: there is a device, and nothing of it is reserved.
torch.backends.mps.is_available = lambda: True
with reserve_gpu_for_training(0, 1 << 40) as reservation:
    assert (reservation.device_index, reservation.reserved_bytes, reservation.unused_bytes) == (None, 0, 0)
    assert reservation.fence == "none"
    reservation.resize(1 << 41)
assert probe(print, ("not run",)).peak_bytes == 0
assert run_training_with_reservation(lambda x: x + 1, (4,), probe_fn=print) == 5
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


def test_a_process_of_the_same_number_in_another_container_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each container the first process is number 1: it was told that it had what another one had reserved."""
    with holder(100 * MIB) as child:
        monkeypatch.setattr(os, "getpid", lambda: child.pid)
        with pytest.raises(sire.ReservationTimeoutError, match="one other process holds"):
            torchtools.reserve_gpu_for_training(blocking=False).__enter__()


# Sire is no part of it: it tries to have so many bytes at each line.
STRANGER = """
import sys
import torch
torch.zeros(1, device="cuda")
with open("/proc/self/maps") as maps:
    print("sire" in sys.modules or "libsire_alloc" in maps.read(), flush=True)
for line in sys.stdin:
    try:
        kept = torch.empty(int(line), dtype=torch.uint8, device="cuda")
        print("had", flush=True)
    except torch.OutOfMemoryError:
        print("out of memory", flush=True)
"""

# It fences so many bytes until a line comes, and lives until the next one.
FENCE = """
import os, sys
import sire
import torch
from sire import torchtools as t
if os.environ["SIRE_TEST_MODE"] == "allocator":
    sire.use_allocator()
with t.reserve_gpu_for_training(0, int(sys.argv[1]), 0, strict=True) as reservation:
    print(reservation.fence, flush=True)
    sys.stdin.readline()
torch.cuda.empty_cache()
print("ended", flush=True)
sys.stdin.readline()
"""


def say(process: subprocess.Popen[str], words: object) -> str:
    """A line to it; its answer."""
    assert process.stdin is not None
    process.stdin.write(f"{words}\n")
    process.stdin.flush()
    return line(process)


def test_a_fence_keeps_out_who_knows_nothing_of_it(mode: str, tmp_path: Path) -> None:
    if not on_software_device():
        pytest.skip("only the software device can be asked, or made to fail")
    shared = {**os.environ, "SIRE_SIM_DIR": str(tmp_path), "SIRE_SIM_MEMORY": "256MiB"}
    plain = {name: value for name, value in shared.items() if name not in ("LD_PRELOAD", "SIRE_HOOK_MODE")}
    with contextlib.ExitStack() as stack:

        def started(code: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", code, *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            return stack.enter_context(running(command, env=environment, **pipes))

        owner, stranger = started(FENCE, shared, str(160 * MIB)), started(STRANGER, plain)
        assert line(owner) == ("cache" if mode == "torch" else "stock")
        assert line(stranger) == "False", "Sire is a part of it"
        assert say(stranger, 120 * MIB) == "out of memory"
        assert say(owner, "") == "ended"
        assert say(stranger, 120 * MIB) == "had"
        assert owner.poll() is None, "the bytes came back with its end, not with the reservation's"


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


def example(**environment: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A copy of the example."""
    command = [sys.executable, ROOT / "examples" / "run_with_reservation_example.py"]
    return running(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment})


def ended_well(copy: subprocess.Popen[str]) -> None:
    """It had its bytes, and trained; what holds them is the device's memory."""
    said = copy.communicate(timeout=240)[0]
    assert copy.returncode == 0, said
    assert "step 4: loss" in said
    assert any(f"64 MiB reserved, behind the fence of kind {kind}" in said for kind in ("stock", "cache")), said


def test_copies_of_the_example_use_two_devices_at_once_and_one_after_the_other(
    mode: str, expandable_segments: bool, tmp_path: Path
) -> None:
    if mode != "preload" or expandable_segments:
        pytest.skip("once is enough: the two sides are tested above in every mode")
    if not on_software_device():
        pytest.skip("there may be one device only")
    # No room for two fences of 64 MiB on one.
    machine = {"SIRE_SIM_DIR": str(tmp_path), "SIRE_SIM_DEVICES": "2", "SIRE_SIM_MEMORY": "112MiB"}
    first, second = {**machine, "LOCAL_RANK": "0"}, {**machine, "LOCAL_RANK": "1"}
    with contextlib.ExitStack() as stack:
        # This process has a device of its own: what it reserves of the first one is there.
        everything = stack.enter_context(given(110 * MIB))
        one, other, beside = (stack.enter_context(example(**each)) for each in (first, first, second))
        ended_well(beside)
        states = ["holding", "waiting", "waiting"]
        until("both others wait for the first device", lambda: sorted(each["state"] for each in entries()) == states)
        everything.release()
        ended_well(one)
        ended_well(other)


def test_the_example_trains_without_cuda(mode: str) -> None:
    if mode != "torch":
        pytest.skip("the process is the same in every mode")
    with example(CUDA_VISIBLE_DEVICES="") as copy:
        said = copy.communicate(timeout=240)[0]
    assert copy.returncode == 0, said
    assert "step 4: loss" in said
    assert "0 MiB reserved, behind the fence of kind none" in said


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
