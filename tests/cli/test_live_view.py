"""What watchers see of real programs: two that take turns on a device, with models in slices; and a generate loop that is paused between its steps."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browsing
from conftest import ROOT, clean_environment
from running import line, running, until
from watching import Dashboard, Terminal

MIB = 1 << 20

TURNS = """
import sys
import time
import sire

print("begins", flush=True)
with sire.time_slice(quantum=3600, group="night <b>z</b>"):
    import torch
    from sire.slyce import SlyceModel

    def block(seed):
        return torch.nn.Linear(1024, 1024)

    slices = [{"name": name, "constructor": block, "config": 0} for name in ("encoder <b>y</b>", "decoder")]
    model = SlyceModel(slices, gpu_strategy="active_only", log_to_console=False)
    managed = torch.nn.Linear(256, 256)
    with torch.no_grad():
        model(torch.ones(1, 1024), active_slice="encoder <b>y</b>")
        with sire.auto_manage(managed):
            managed(torch.ones(1, 256, device="cuda"))
    print("ready", flush=True)
    while True:
        sire.safe_point()
        time.sleep(0.002)
"""


class Machine:
    """A software device and a private directory, for programs of PyTorch's under `sire run`."""

    def __init__(self, command: Path, library: Path, python: Path, root: Path) -> None:
        self.command, self.python = command, python
        device = root / "device"
        device.mkdir()
        self.environment = clean_environment(
            XDG_RUNTIME_DIR=root,
            TERM="xterm-256color",
            TORCHTOOLS_LOCK_DIR=root,
            SIRE_LIBRARY=library,
            PYTHONPATH=ROOT / "python-shim" / "src",
            SIRE_SIM_DIR=device,
            SIRE_SIM_MEMORY="256MiB",
        )

    def start(self, program: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """The number of what this starts is the program's: `sire run` becomes it."""
        told = [self.command, "run", "--", self.python, "-c", program]
        environment = {**self.environment, "SIRE_CONTROL": "1", "OMP_NUM_THREADS": "1"}
        return running(told, 900, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, *arguments: str | int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.command, *map(str, arguments)], env=self.environment, capture_output=True, text=True, timeout=120, check=False)

    def processes(self) -> dict[int, dict[str, Any]]:
        """What each says, by number."""
        return {each["pid"]: each for each in json.loads(self.run("ps", "--json").stdout)["processes"]}


@pytest.fixture(scope="module")
def machine(command: Path, library: Path, environment_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    root = tmp_path_factory.mktemp("run")
    root.chmod(0o700)
    return Machine(command, library, environment_dir / "bin" / "python", root)


@pytest.fixture(scope="module")
def pair(machine: Machine) -> Iterator[tuple[int, int]]:
    """Two that take turns: the first has its turn, and the other waits."""
    with machine.start(TURNS) as first:
        assert [line(first), line(first)] == ["begins", "ready"]
        with machine.start(TURNS) as second:
            assert line(second) == "begins"
            until("the second waits", lambda: turn(machine.processes().get(second.pid, {})) == "waiting")
            yield first.pid, second.pid


def turn(process: dict[str, Any]) -> str | None:
    """Where it is in its turns."""
    turns = process.get("stats", {}).get("time_slice")
    return None if turns is None else str(turns["state"])


def test_ps_says_whose_turn_it_is_and_where_slices_are(machine: Machine, pair: tuple[int, int]) -> None:
    found = machine.processes()
    assert [turn(found[pid]) for pid in pair] == ["resident", "waiting"]
    units = found[pair[0]]["program"]["units"]
    assert [(each["of"], each["name"], each["tier"], each["uses"]) for each in units] == [
        ("slyce 1", "encoder <b>y</b>", "gpu", 1),
        ("slyce 1", "decoder", "not made", 0),
    ]
    assert units[0]["bytes"] >= 4 * MIB
    assert any(each["kind"] == "load" and each["name"] == "encoder <b>y</b>" for each in found[pair[0]]["program"]["events"])


@pytest.mark.parametrize("columns", [80, 40])
def test_top_shows_turns_slices_models_tiers_and_events(machine: Machine, pair: tuple[int, int], columns: int) -> None:
    with Terminal([str(machine.command), "top", "--interval", "0.1"], machine.environment, columns, lines=40) as terminal:
        first, second = min(pair), max(pair)
        # The list is by number, which need not be the order of the start.
        terminal.shows("sire top  2 processes", f"{pair[0]} resident", f"{pair[1]} waiting")
        if first != pair[0]:
            terminal.press("j")
        terminal.shows("MODELS", "loaded", "SLICE IN", "gpu        4.0 MiB", "not made", "tiers", "safe points", "EVENTS", "load encoder")
        assert any("COPIED" in text for text in terminal.lines()) == (columns == 80)
        assert any("LASTING" in text and "night" in text for text in terminal.lines()) == (columns == 80)
        assert all(len(text) <= columns for text in terminal.lines())
        assert second in pair
        terminal.press("q")
        assert terminal.ended() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_shows_turns_slices_and_models(machine: Machine, pair: tuple[int, int], tmp_path: Path, width: int) -> None:
    with Dashboard(machine.command, machine.environment) as dashboard, browsing(dashboard.address, width, tmp_path) as window:
        window.shows("2 processes", "Turns", "encoder <b>y</b>", "group night <b>z</b>", "gpu, 1 uses, 4.0 MiB", "/s copied", "model ")
        page = window.html()
        assert window.too_wide() == []
    assert "<h2>Turns</h2>" in page
    assert 'id="turnsbox" hidden' not in page
    assert f'<span>{pair[0]} </span><span class="pill resident">resident</span>' in page
    assert f'<span>{pair[1]} </span><span class="pill held">waiting</span>' in page
    assert "slice encoder &lt;b&gt;y&lt;/b&gt; of slyce 1" in page
    assert "group night &lt;b&gt;z&lt;/b&gt;" in page
    # Names are text, whatever they hold.
    assert "<b>y</b>" not in page
    assert "<b>z</b>" not in page


GENERATE = """
import hashlib
import sys
import threading
import torch
import sire

torch.manual_seed(0)
with sire.region("model", backup="cpu"):
    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.Tanh(), torch.nn.Linear(4096, 1024)).cuda()
start = torch.randn(1, 1024, device="cuda")


def generate(enough):
    token, digest, steps = start.clone(), hashlib.sha256(), 0
    while not enough(steps):
        with torch.no_grad():
            token = torch.tanh(model(token))
        digest.update(bytes(token.cpu().view(torch.uint8).flatten().tolist()))
        steps += 1
        if steps == 3:
            print("going", flush=True)
        sire.safe_point()
    return digest.hexdigest(), steps


over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
disturbed, steps = generate(lambda steps: over.is_set() and steps > 3)
alone, _ = generate(lambda done: done == steps)
print("same" if disturbed == alone else "different", flush=True)
"""


def test_a_generate_loop_gives_its_memory_between_two_steps_and_goes_on_with_the_same_numbers(machine: Machine) -> None:
    with machine.start(GENERATE) as program:
        assert line(program) == "going"

        def resident() -> int:
            return sum(each["resident_bytes"] for each in machine.processes()[program.pid]["stats"]["regions"] if each["tag"] == "model")

        before = resident()
        assert before >= 32 * MIB
        for _ in range(2):
            paused = machine.run("pause", program.pid)
            assert paused.returncode == 0, paused.stderr
            assert "given back" in paused.stdout
            assert resident() == 0
            resumed = machine.run("resume", program.pid)
            assert resumed.returncode == 0, resumed.stderr
            assert resident() == before
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()
        # The same steps once more, undisturbed, say "going" too.
        assert [line(program), line(program)] == ["going", "same"]
