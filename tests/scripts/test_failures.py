"""What scripts/test prints of a failed step: each failed test's name and place, wherever in the log they are."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "test_support"))

from failures import names, report  # noqa: E402

CARGO = """\
   Compiling sire-sim v0.1.0 (/src/crates/sire-sim)
     Running tests/clock.rs (target/release/deps/clock-2a64839b4e64a403)

running 2 tests
test works ... ok
test waits ... FAILED

failures:

---- waits stdout ----

thread 'waits' (4711) panicked at crates/sire-sim/tests/clock.rs:266:5:
assertion `left == right` failed
  left: 1

failures:
    waits

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.11s

     Running tests/memory.rs (target/release/deps/memory-ce52ec5797582509)

running 1 test
test works ... ok
"""

PYTEST = """\
..F.E
=================================== FAILURES ===================================
E   assert 1 == 2
=========================== short test summary info ============================
FAILED tests/python/test_values.py::test_sizes[6GiB] - assert 1 == 2
ERROR tests/python/test_values.py::test_tags - OSError: no
1 failed, 3 passed, 1 error in 2.53s
"""

# A test that ran another pytest shows its output.
NESTED = """\
E   AssertionError: test_control.py in mode torch:
E     .F
E     ____________________ test_outside ____________________
E     >       assert paused.returncode == 0
E     E       assert 4 == 0
E     12 passed, 1 failed
FAILED tests/python/test_device_modes.py::test_on_device[torch] - AssertionError: test_control.py in mode torch:
"""


def test_a_test_of_cargo_is_named_with_its_file_and_place() -> None:
    assert names(CARGO) == ["tests/clock.rs::waits"]
    assert report(CARGO) == [
        "failed: tests/clock.rs::waits",
        "thread 'waits' (4711) panicked at crates/sire-sim/tests/clock.rs:266:5:",
        "assertion `left == right` failed",
    ]


def test_a_test_of_pytest_is_named_once() -> None:
    assert names(PYTEST) == ["tests/python/test_values.py::test_sizes[6GiB]", "tests/python/test_values.py::test_tags"]
    assert "FAILED tests/python/test_values.py::test_sizes[6GiB] - assert 1 == 2" in report(PYTEST)


def test_a_failure_inside_a_test_says_what_was_expected() -> None:
    assert report(NESTED) == [
        "failed: tests/python/test_device_modes.py::test_on_device[torch]",
        "E   AssertionError: test_control.py in mode torch:",
        "E     >       assert paused.returncode == 0",
        "E     E       assert 4 == 0",
        "FAILED tests/python/test_device_modes.py::test_on_device[torch] - AssertionError: test_control.py in mode torch:",
    ]


def test_what_does_not_compile_is_shown_with_its_place() -> None:
    log = "error[E0308]: mismatched types\n  --> crates/sire-core/src/lib.rs:3:5\nerror: could not compile `sire-core`\n"
    assert (names(log), report(log)) == ([], log.splitlines())


def test_a_log_without_failures_says_nothing_and_a_long_one_is_cut() -> None:
    assert report("running 1 test\ntest works ... ok\n") == []
    many = "failures:\n" + "".join(f"    test{n}\n" for n in range(100))
    assert report(many, most=3) == ["failed: test0", "failed: test1", "failed: test2", "and 97 lines more"]
