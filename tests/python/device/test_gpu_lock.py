"""What is left of a reservation: without the library a lock, where it fails nothing."""

from __future__ import annotations

import errno
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import ledgers
import pytest
import sire
import torch
from ledgers import MIB
from sire import torchtools
from sire.torchtools import gpu_lock


@pytest.fixture(autouse=True)
def locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Ledgers of this test's own."""
    yield from ledgers.fresh(monkeypatch, tmp_path)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none to be found."""

    def missing() -> None:
        raise sire.LibraryNotFoundError("there is no library")

    monkeypatch.setattr(gpu_lock._library, "load", missing)


def locked() -> torchtools.Reservation:
    """A reservation without the library, and at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchtools.ReservationWarning)
        return torchtools.reserve_gpu_for_training(0, 10 * MIB, 0, blocking=False).__enter__()


def test_without_the_library_a_lock_keeps_others_out(no_library: None, tmp_path: Path) -> None:
    # Every other one fails: that of the second is held by the first.
    for fence in (True, False):
        why = "is locked, but nothing of it is reserved: there is no library"
        with pytest.warns(torchtools.ReservationWarning, match=why) as told:
            first = torchtools.reserve_gpu_for_training(0, 10 * MIB, 0, fence=fence).__enter__()
        assert [each.filename for each in told] == [__file__], "where it was asked for"
        assert (first.reserved_bytes, first.fence) == (0, "none")
        assert list(tmp_path.glob("torchtools_gpu_lock_*.lock"))
        # Who does not get it is not told that the GPU is locked: warnings are errors here.
        with pytest.raises(sire.ReservationTimeoutError, match="another process holds the lock"):
            torchtools.reserve_gpu_for_training(0, 10 * MIB, 0, blocking=False, fence=fence).__enter__()
        first.resize(20 * MIB)
        first.release()
    with pytest.raises(sire.LibraryNotFoundError):
        torchtools.reserve_gpu_for_training(0, 10 * MIB, 0, strict=True).__enter__()


def forked(does: Callable[[], object]) -> int:
    """A child that does this and nothing else."""
    with warnings.catch_warnings():
        # Of threads whose locks the child might want: it wants none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            does()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_workers_that_were_forked_inside_neither_keep_the_lock_nor_give_it_back(no_library: None) -> None:
    """A DataLoader's workers outlived the reservation, and its lock lived as long as they."""
    first = locked()
    assert os.waitpid(forked(first.release), 0)[1] == 0
    with pytest.raises(sire.ReservationTimeoutError):
        locked()
    reader, writer = os.pipe()
    worker = forked(lambda: os.read(reader, 1))
    try:
        first.release()
        locked().release()
        assert os.waitpid(worker, os.WNOHANG) == (0, 0), "it was there all the time"
    finally:
        os.write(writer, b".")
        assert os.waitpid(worker, 0)[1] == 0
        os.close(reader)
        os.close(writer)


def lock_file() -> str:
    return f"torchtools_gpu_lock_{torch.cuda.get_device_properties(0).uuid}.lock"


@pytest.mark.parametrize("wrong", ["missing", "file", "link", "flock"])
def test_a_lock_that_the_system_does_not_give_is_named(
    no_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    """It was said that the GPU is locked, and then an OSError was raised, which is no SireError."""

    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    folder = tmp_path / "locks"
    reason = {"missing": errno.ENOENT, "file": errno.ENOTDIR, "link": errno.ELOOP, "flock": errno.ENOLCK}[wrong]
    if wrong == "file":
        folder.touch()
    elif wrong != "missing":
        folder.mkdir()
    monkeypatch.setenv("TORCHTOOLS_LOCK_DIR", str(folder))
    if wrong == "link":
        (folder / lock_file()).symlink_to(tmp_path / "elsewhere")
    if wrong == "flock":
        monkeypatch.setattr(gpu_lock.fcntl, "flock", refuses)
    begins = f"the lock {folder / lock_file()} cannot be had: {os.strerror(reason)}. It has to be a file of its own"
    # Every warning is an error here.
    with pytest.raises(sire.UnsupportedError, match="TORCHTOOLS_LOCK_DIR names another one") as caught:
        torchtools.reserve_gpu_for_training(0, 10 * MIB, 0).__enter__()
    assert str(caught.value).startswith(begins)
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_that_is_told_of_as_an_error_is_not_kept(no_library: None) -> None:
    with pytest.raises(torchtools.ReservationWarning) as caught:
        torchtools.reserve_gpu_for_training(0, 10 * MIB, 0).__enter__()
    locked().release()
    assert "there is no library" in str(caught.value)


# --- a reservation that nobody got ------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", [True, False])
@pytest.mark.parametrize("failure", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_what_nobody_got_is_not_reserved(
    mode: str, monkeypatch: pytest.MonkeyPatch, fence: bool, failure: BaseException
) -> None:
    """Where its thread could not be started, or Ctrl-C came then, the bytes were reserved until the process ended."""
    start, begun = threading.Thread.start, list[threading.Thread]()

    def fails(self: threading.Thread) -> None:
        if isinstance(failure, KeyboardInterrupt):
            start(self)
        begun.append(self)
        raise failure

    before = torch.cuda.mem_get_info(0)[0]
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        patch.setattr(threading.Thread, "start", fails)
        # A fence of the library's needs no thread.
        torchtools.reserve_gpu_for_training(0, 40 * MIB, 0, fence=fence and mode == "torch").__enter__()
    assert [thread.name for thread in begun] == ["sire-reservation"]
    assert not begun[0].is_alive()
    assert sire._library.load().reservations(0)["entries"] == []
    assert torch.cuda.mem_get_info(0)[0] == before
    # Nor does this process take itself for one that has some.
    with torchtools.reserve_gpu_for_training(0, timeout=60) as whole:
        assert whole.reserved_bytes > 0
