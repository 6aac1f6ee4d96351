"""Counts the tests in a log of cargo or pytest: prints PASSED FAILED SKIPPED."""

from __future__ import annotations

import re
import sys
from pathlib import Path

CARGO = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", re.MULTILINE)
PYTEST = re.compile(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.:]+s?(?: \([\d:]+\))?(?: =+)?$", re.MULTILINE)


def counted(log: str) -> tuple[int, int, int]:
    """Tests passed, failed (errors included) and skipped, over every summary in the log."""
    passed = failed = skipped = 0
    for ok, bad, ignored in CARGO.findall(log):
        passed, failed, skipped = passed + int(ok), failed + int(bad), skipped + int(ignored)
    for summary in PYTEST.findall(log):
        numbers = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary)}
        passed += numbers.get("passed", 0) + numbers.get("xfailed", 0)
        failed += sum(numbers.get(word, 0) for word in ("failed", "error", "errors", "xpassed"))
        skipped += numbers.get("skipped", 0)
    return passed, failed, skipped


if __name__ == "__main__":
    print(*counted(Path(sys.argv[1]).read_text(errors="replace")))
