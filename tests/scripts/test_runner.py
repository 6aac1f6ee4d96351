"""What scripts/test does when it is told to end: its step ends with it, and all that the step has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from running import running, until  # noqa: E402

# As scripts/test, with a step of its own.
SCRIPT = """\
set -uo pipefail
root=$1 quick=0 gpu=0 only='' torch='' offline=''
unset CARGO_TARGET_DIR
declare -A needs=() wanted=()
. scripts/test_support/runner.sh
python=python3
mkdir -p "$logs"
step_long() { sh -c 'echo $$; exec sleep 300' | { read -r pid; echo "$pid"; %s; sleep 300; }; }
run_step long
"""


def lives(pid: int) -> bool:
    """Whether the process does something, or at least waits."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("deaf", [":", "trap '' TERM"], ids=["hears", "deaf"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_step_ends_with_the_script(tmp_path: Path, number: signal.Signals, deaf: str) -> None:
    """cargo and pytest went on after Ctrl-C: shells start what is in the background with that ignored."""
    log = tmp_path / ".sire" / "logs" / "long.log"
    told = ["bash", "-c", SCRIPT % deaf, "test", str(tmp_path)]
    # Whoever runs this may have been started so as well.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with running(told, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **heard) as script:
        until("the step runs", lambda: log.exists() and log.read_text().endswith("\n"))
        pid = int(log.read_text())
        try:
            script.send_signal(number)
            said, err = script.communicate(timeout=30)
            assert (script.returncode, said, err) == (128 + number, "==> long\n", "")
            assert not lives(pid)
        finally:
            if lives(pid):
                os.killpg(os.getpgid(pid), signal.SIGKILL) if os.getpgid(pid) != os.getpgid(0) else os.kill(pid, signal.SIGKILL)
