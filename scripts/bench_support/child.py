"""Talks to the measuring programs: one call, or a process that does a cycle whenever it is asked to."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figures import Unmeasurable, Wrong
from .workshop import Place, Workshop

WRONG_BYTES = 3
# The exit status of a program that asks for something that the library does not have.
NOT_OFFERED = 4
Sample = dict[str, float]


@dataclass(frozen=True)
class Setup:
    """What a cycle program works on."""

    amount: int
    pieces: int
    backup: str = "host"
    retain: bool = True
    directory: Path | None = None
    # A profile of the model clock, by which times are taken then.
    profile: str = ""

    def arguments(self) -> list[str]:
        words = [str(self.amount), str(self.pieces), self.backup, "retain" if self.retain else "drop"]
        return [*words, str(self.directory)] if self.directory else words

    def device_memory(self) -> int:
        return self.amount + min(self.amount, 512 << 20)


def failed(what: str, status: int | None, message: str) -> Wrong:
    """A program's failure in words."""
    why = "WRONG BYTES" if status == WRONG_BYTES else f"exit status {status}"
    last = "\n".join(message.strip().splitlines()[-3:])
    return Wrong(f"{what}: {why}: {last}")


def call(
    shop: Workshop,
    program: str,
    *arguments: str,
    saver: Place | None = None,
    memory: int = 0,
    timing: bool = True,
    more: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Runs a program to its end; the lines of its answer."""
    environment = shop.environment(saver, memory, timing) | dict(more or {})
    done = subprocess.run([str(shop.programs[program]), *arguments], env=environment, capture_output=True, text=True)
    if program == "raw" and done.returncode == 1 and "O_DIRECT" in done.stderr:
        raise Unmeasurable(done.stderr.strip())
    if done.returncode == NOT_OFFERED:
        raise Unmeasurable(f"not built in this library: {done.stderr.strip()}")
    if done.returncode != 0:
        raise failed(f"{program} {' '.join(arguments)}", done.returncode, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


class Cycles:
    """A running cycle program."""

    def __init__(self, process: subprocess.Popen[str], what: str) -> None:
        self._process = process
        self._what = what

    def cycle(self, ceiling_last: bool, fault: bool = False) -> Sample:
        """One cycle, its ceiling measured first or last."""
        return self.ask(f"{'fault ' if fault else ''}{int(ceiling_last)}")

    def ask(self, line: str) -> Sample:
        """What the program answers to a line."""
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.said()

    def said(self) -> Sample:
        """The next that it says."""
        assert self._process.stdout and self._process.stderr
        line = self._process.stdout.readline()
        if not line:
            message, status = self._process.stderr.read(), self._process.wait()
            if status == NOT_OFFERED:
                raise Unmeasurable(f"not built in this library: {message.strip()}")
            raise failed(self._what, status, message)
        sample: Sample = json.loads(line)
        return sample


@contextmanager
def cycles(shop: Workshop, saver: Place, setup: Setup, program: str = "cycle", *arguments: str) -> Iterator[Cycles]:
    """A program that does cycles, under a saver, ended afterwards."""
    words = [str(setup.amount), str(setup.pieces), *arguments] if arguments else setup.arguments()
    command = [str(shop.programs[program]), *words]
    environment = shop.environment(saver, setup.device_memory())
    if setup.profile:
        environment["SIRE_SIM_PROFILE"] = setup.profile
    elif shop.software and program == "cycle" and setup.backup == "host":
        # One thread waits for one that copies, each with a processor of its own.
        environment |= {"SIRE_SIM_SPIN": "1", "SIRE_SIM_ENGINES": "1"}
    with started(command, environment, f"{saver.name}, {program} {' '.join(words)}") as running:
        yield running


@contextmanager
def talking(shop: Workshop, program: str, *arguments: str, memory: int) -> Iterator[Cycles]:
    """A program under Sire that answers lines."""
    environment = shop.environment(shop.sire, memory, timing=False)
    with started([str(shop.programs[program]), *arguments], environment, f"{program} {' '.join(arguments)}") as running:
        yield running


@contextmanager
def started(command: list[str], environment: dict[str, str], what: str) -> Iterator[Cycles]:
    """A program, ended afterwards."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        yield Cycles(process, what)
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """It has no more to do, and is gone afterwards."""
    if process.stdin:
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


Ask = Callable[[str], dict[str, Any]]


@contextmanager
def answering(command: Sequence[str], environment: Mapping[str, str], what: str) -> Iterator[Ask]:
    """A process that answers each line with one line of JSON, so that what it takes to start is paid once and not per repetition."""
    with tempfile.TemporaryFile("w+") as complaints:
        pipe = subprocess.PIPE
        process = subprocess.Popen(list(command), env=dict(environment), stdin=pipe, stdout=pipe, stderr=complaints, text=True)

        def ask(line: str) -> dict[str, Any]:
            assert process.stdin and process.stdout
            try:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass
            answer = process.stdout.readline()
            if not answer.startswith("{"):
                process.kill()
                status = process.wait()
                complaints.seek(0)
                raise failed(f"{what} {line}", status, complaints.read())
            result: dict[str, Any] = json.loads(answer)
            return result

        try:
            yield ask
        finally:
            end(process)
