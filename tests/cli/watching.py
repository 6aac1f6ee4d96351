"""Sire's views as a person has them: a terminal with `sire top`, and the dashboard over HTTP. A browser is in `browser.py`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import termios
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from running import LIMIT, line, running


class Screen:
    """What a program shows on a screen, and the keys that it gets."""

    def lines(self) -> list[str]:
        """The screen now."""
        raise NotImplementedError

    def press(self, keys: str) -> None:
        raise NotImplementedError

    def shows(self, *texts: str) -> None:
        """Waits until all of them are there."""
        end = time.monotonic() + 60
        while not all(any(text in line for line in self.lines()) for text in texts):
            assert time.monotonic() < end, "\n".join([f"not shown: {texts}", *self.lines()])
            # To look may be to start a process.
            time.sleep(0.05)


class Terminal(Screen):
    """A program on a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], columns: int, lines: int = 30) -> None:
        pyte = pytest.importorskip("pyte")
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            try:
                # Before the program is there to ask.
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
                os.execve(command[0], command, environment)
            finally:
                os._exit(127)
        self._timer = threading.Timer(LIMIT, os.kill, (self.pid, signal.SIGKILL))
        self._timer.daemon = True
        self._timer.start()
        self._status: int | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._timer.cancel()
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def lines(self) -> list[str]:
        """The screen now."""
        while select.select([self._fd], [], [], 0.05)[0]:
            try:
                said = os.read(self._fd, 1 << 16)
            except OSError:
                break
            self._stream.feed(said)
        return [line.rstrip() for line in self._screen.display]

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def ended(self) -> int:
        """How it ended. What it still says is read, so that it need not wait for that."""
        while self._status is None:
            self.lines()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._timer.cancel()
                self._status = os.waitstatus_to_exitcode(status)
        return self._status


class Multiplexer(Screen):
    """A program in a session of tmux that nobody is attached to. The server is of its own, and ends with the block."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, columns: int, lines: int = 30) -> None:
        tmux = shutil.which("tmux")
        if tmux is None:
            pytest.skip("tmux is not installed (apt-get install tmux)")
        self._tmux, self._environment = tmux, environment
        # Short, whatever the test's folder is called: a socket's path has an end. The server keeps its socket there as long as it lives.
        self._folder = tempfile.TemporaryDirectory(prefix="sire-tmux-")
        self._status = folder / "status"
        session = ["new-session", "-d", "-x", str(columns), "-y", str(lines)]
        # The shell says how it ended when the program is gone, and the session with it; whoever is killed here leaves nothing that stays.
        told = f"timeout --foreground {LIMIT:.0f} {shlex.join(command)}; echo $? > {shlex.quote(str(self._status))}"
        try:
            self._tell("-f", os.devnull, *session, told)
        except BaseException:
            self.__exit__()
            raise

    def _tell(self, *arguments: str) -> str:
        command = [self._tmux, "-S", f"{self._folder.name}/socket", *arguments]
        environment = {name: value for name, value in self._environment.items() if name != "TMUX"}
        done = subprocess.run(command, env={**environment, "LC_ALL": "C.UTF-8"}, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def __enter__(self) -> Multiplexer:
        return self

    def __exit__(self, *_raised: object) -> None:
        # Where the program has ended, the server has, too.
        with contextlib.suppress(AssertionError):
            self._tell("kill-server")
        self._folder.cleanup()

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._tell("capture-pane", "-p").splitlines()]

    def press(self, keys: str) -> None:
        self._tell("send-keys", "-l", keys)

    def resize(self, columns: int, lines: int = 30) -> None:
        """The window's size from now on."""
        self._tell("resize-window", "-x", str(columns), "-y", str(lines))

    def ended(self) -> int:
        """How it ended."""
        end = time.monotonic() + 60
        while not (self._status.exists() and (said := self._status.read_text().strip())):
            assert time.monotonic() < end, "it does not end"
            time.sleep(0.01)
        return int(said)


class Dashboard:
    """`sire dashboard` on a port of its own."""

    def __init__(self, command: Path, environment: dict[str, str], *arguments: str) -> None:
        told = [command, "dashboard", "--listen", "127.0.0.1:0", "--interval", "0.1", *arguments]
        self.program = running(told, 900, env=environment, stdout=subprocess.PIPE)
        self.process = self.program.__enter__()
        self.address = line(self.process)
        self.url, _, self.token = self.address.partition("#token=")

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.program.__exit__(None, None, None)

    def ask(self, path: str, order: Any = None, token: str | None = None, host: str | None = None) -> tuple[int, str]:
        """Status and body."""
        request = urllib.request.Request(self.url + path, method="GET" if order is None else "POST")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        if host is not None:
            request.add_header("Host", host)
        if order is not None:
            request.data = order if isinstance(order, bytes) else json.dumps(order).encode()
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def view(self) -> dict[str, Any]:
        status, body = self.ask("api/view", token=self.token)
        assert status == 200, body
        found: dict[str, Any] = json.loads(body)
        return found
