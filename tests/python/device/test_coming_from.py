"""The Python of docs/coming-from.md runs as it stands, and prints what its comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "coming-from.md"
# What the page does not show: everything is awake, and goes with its tensors.
AFTER = """
del model, cache
print(allocator.asleep, allocator.get_current_usage())
"""


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not here")
def test_the_pages_python_runs_as_it_stands(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    promised = re.findall(r"^print\(.*\) +# (.+)$", code, re.MULTILINE)
    assert len(promised) == code.count("print(") == 5
    program = tmp_path / "coming_from.py"
    program.write_text(code + AFTER)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*promised, "False 0"]
