"""What one user's process keeps from another user of the machine: its socket, its tags, its backups, its traces. Only root can be other users."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from running import line, running

SECRET = "secret/weights"
PROGRAM = f"""
import sys
import sire
from sire import _library

with sire.region("{SECRET}", backup="disk"):
    weights = _library.load().allocate(2 << 20, 0)
with sire.region("{SECRET}/host", backup="cpu"):
    host = _library.load().allocate(2 << 20, 0)
sire.pause()
print(sire.control.open().path, flush=True)
while sys.stdin.readline():
    sire.safe_point()
    print("passed", flush=True)
"""
USERS = range(20_001, 20_006)


@pytest.fixture
def root() -> Iterator[Path]:
    """A place like the system's temporary directory, which pytest's own are not: all users can get there."""
    if os.geteuid() != 0:
        pytest.skip("only root can be other users")
    place = Path(tempfile.mkdtemp(prefix="sire-users-"))
    try:
        place.chmod(0o1777)
        if as_user(USERS[0], lambda: str(os.access(place, os.X_OK))) != "True":
            pytest.skip("this root may not be other users, or they cannot reach the temporary directory")
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def as_user(user: int, attempt: Callable[[], str]) -> str:
    """What another user makes of it; the name of an exception that is raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Whoever hangs, in a lock of another thread's perhaps, says nothing.
        signal.alarm(120)
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            said = attempt()
        except BaseException as error:
            said = type(error).__name__
        with contextlib.suppress(OSError):
            os.write(writer, said[: 1 << 12].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        said = answers.read().decode()
    os.waitpid(child, 0)
    return said


def asked(path: str, request: bytes) -> str:
    """What a socket answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(path)
        # Whoever is refused at the door may hear so before he has said anything.
        with contextlib.suppress(BrokenPipeError):
            client.sendall(request)
        with client.makefile("rb") as replies:
            return replies.readline().decode()


def test_nobody_else_can_ask_a_process_or_read_what_it_keeps(root: Path, command: Path, library: Path, stand_in: Path) -> None:
    runtime, disk = root / "runtime", root / "disk"
    runtime.mkdir(mode=0o700)
    environment = clean_environment(
        PYTHONPATH=ROOT / "python-shim" / "src",
        SIRE_LIBRARY=library,
        SIRE_LIBCUDA=stand_in,
        SIRE_SIM_MEMORY="64MiB",
        XDG_RUNTIME_DIR=runtime,
        SIRE_DISK_DIR=disk,
    )
    with running([sys.executable, "-c", PROGRAM], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        path = line(program)
        assert path.endswith(".sock")
        assert SECRET in asked(path, b'{"verb":"list"}\n')
        trace = json.loads(asked(path, b'{"verb":"trace"}\n'))["ok"]["path"]
        kept = [Path(path), Path(trace), disk, *disk.rglob("*")]
        for private in (disk, Path(path).parent):
            assert stat.S_IMODE(private.stat().st_mode) == 0o700, private
        for user in USERS:
            for file in kept:
                assert as_user(user, lambda file=file: file.read_bytes().hex()) == "PermissionError", file
            assert as_user(user, lambda: asked(path, b'{"verb":"list"}\n')) == "PermissionError"
            assert as_user(user, lambda: Path(f"/proc/{program.pid}/mem").read_bytes().hex()) == "PermissionError"
        others_can_find_nobody(command, root, program.pid)
        others_are_refused_at_an_open_door(path, program)


def others_can_find_nobody(command: Path, root: Path, pid: int) -> None:
    """The command as another user: nobody is listed, and nobody can be paused."""
    own = root / "sire"
    shutil.copyfile(command, own)
    own.chmod(0o755)
    runtime = root / "another"
    runtime.mkdir(mode=0o700)
    os.chown(runtime, USERS[0], USERS[0])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(own), *arguments],
            env=clean_environment(XDG_RUNTIME_DIR=runtime),
            user=USERS[0],
            group=USERS[0],
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    assert json.loads(run("ps", "--json").stdout)["processes"] == []
    assert run("pause", str(pid)).returncode == 3


def others_are_refused_at_an_open_door(path: str, program: subprocess.Popen[str]) -> None:
    """Whatever the directory's and the socket's modes say: the kernel says who knocks, and the process asks it."""
    Path(path).parent.parent.chmod(0o755)
    Path(path).parent.chmod(0o755)
    Path(path).chmod(0o666)
    for user in USERS:
        for request in (b'{"verb":"list"}\n', b'{"verb":"pause"}\n'):
            said = as_user(user, lambda request=request: asked(path, request))
            assert "this socket answers the user of its process only" in said
            assert SECRET not in said
    # Nothing that they asked for happens.
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()
    assert line(program) == "passed"
    assert json.loads(asked(path, b'{"verb":"list"}\n'))["ok"]["control"]["paused"] == []
