"""A run of scripts/bench ends in time and keeps what it has: groups that fail, take too long, or are cut short by
Ctrl-C cost only their own figures.

The groups here are not those of the plan, so nothing has to be built.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from running import running, until  # noqa: E402

from bench_support import limits  # noqa: E402
from bench_support.figures import Figure, Unmeasurable, Wrong  # noqa: E402
from bench_support.main import Bench, Group  # noqa: E402


class Machine:
    described = "nowhere"


class Few(Bench):
    """A run of these groups."""

    def __init__(self, folder: Path, groups: list[Group], minutes: float = 5, only: str = "") -> None:
        options = Namespace(
            smoke=True, repeats=None, only=[only], json=folder / "out.json", picture=folder / "out.png", minutes=minutes
        )
        super().__init__(options, Machine(), folder)  # type: ignore[arg-type]
        self.groups = groups

    def plan(self) -> list[Group]:
        return self.groups

    def build(self) -> None:
        pass


def good(name: str) -> Group:
    return Group((name,), 60, lambda: [Figure(name, "s", [1.0])])


def sleeps(folder: Path) -> list[Figure]:
    """A child and its child, which would go on for long."""
    script = f"sleep 600 & echo $! > {folder / 'pid'}; wait"
    subprocess.run(["sh", "-c", script], check=False, timeout=600)
    return []


def raises(error: Exception) -> list[Figure]:
    raise error


def is_there(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def figures(folder: Path) -> list[str]:
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return [figure["name"] for figure in found]


def test_what_takes_too_long_is_said_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = Group(("slow",), 3, lambda: sleeps(tmp_path))
    bench = Few(tmp_path, [good("before"), slow, good("after")])
    bench.run()
    assert bench.finish() == 0
    out = capsys.readouterr()
    assert "Not measured: slow: it did not end within 3 s" in out.out
    assert "[2/3] slow ..." in out.err
    assert figures(tmp_path) == ["before", "after"]
    until("the child's child is gone", lambda: not is_there(int((tmp_path / "pid").read_text())))


def test_what_fails_is_said_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors = [Wrong("bytes"), OSError("no such program"), KeyError("seconds"), Unmeasurable("there is none")]
    groups = [Group((f"bad{number}",), 60, lambda error=error: raises(error)) for number, error in enumerate(errors)]  # type: ignore[misc]
    bench = Few(tmp_path, [*groups, good("after")])
    bench.run()
    assert bench.finish() == 1
    out = capsys.readouterr()
    assert "Not measured: bad3: there is none" in out.out
    for text in (
        "WRONG: bad0: bytes",
        "WRONG: bad1: it failed: OSError: no such program",
        "WRONG: bad2: it failed: KeyError",
    ):
        assert text in out.err
    assert figures(tmp_path) == ["after"]


def test_a_name_that_no_figure_has_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    bench = Few(tmp_path, [good("disk"), good("file.read")], only="disk,file")
    with pytest.raises(Wrong, match=r"--only disk,file: no figure's name starts so; .* one of: disk file.read"):
        bench.run()
    assert not bench.took


def test_a_name_that_a_group_does_not_have_is_told_with_those_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Few(tmp_path, [good("disk"), good("file.read")], only="disk.raed")
    bench.run()
    assert bench.finish() == 1
    assert "Not measured: disk.raed: no figure's name starts so; there are: disk" in capsys.readouterr().out


def test_a_run_begins_nothing_after_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Few(tmp_path, [good("first")], minutes=0)
    bench.run()
    assert bench.finish() == 1
    assert "the run's 0 minutes were over; --only first measures it alone" in capsys.readouterr().out


INTERRUPTED = """
    import sys
    sys.path[:0] = [{here!r}, {scripts!r}]
    from pathlib import Path
    import test_limits_of_a_run as tests
    from bench_support import limits
    folder = Path({folder!r})
    slow = tests.Group(("slow",), 600, lambda: tests.sleeps(folder))
    bench = tests.Few(folder, [tests.good("before"), slow, tests.good("after")])
    limits.watch()
    try:
        bench.run()
    except limits.Ended:
        bench.finish()
        sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_writes_what_it_has(how: signal.Signals, tmp_path: Path) -> None:
    script = textwrap.dedent(INTERRUPTED).format(
        here=str(Path(__file__).parent), scripts=str(ROOT / "scripts"), folder=str(tmp_path)
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running([sys.executable, "-c", script], **pipes) as process:
        pid = tmp_path / "pid"
        until("it measures", lambda: (pid.is_file() and bool(pid.read_text().strip())) or process.poll() is not None)
        assert process.poll() is None, "it ended before it was told to"
        assert figures(tmp_path) == ["before"], "what was measured is on the disk before the run ends"
        process.send_signal(how)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "| `before` |" in out
    assert figures(tmp_path) == ["before"]
    until("the child's child is gone", lambda: not is_there(int((tmp_path / "pid").read_text())))


def test_a_limit_that_is_kept_changes_nothing() -> None:
    with limits.at_most(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
