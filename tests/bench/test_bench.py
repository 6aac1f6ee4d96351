"""scripts/bench measures, checks every byte, and reports in the agreed form; on a driver that lies it gives no figure.

Tiny sizes on the software device, offline: nothing here says how fast anything is.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from bench_support import other_figures, simulated_figures  # noqa: E402
from bench_support.figures import Figure, Target, Unmeasurable, Wrong, rates, spread, ways  # noqa: E402
from bench_support.other_figures import steadier  # noqa: E402
from bench_support.pause_figures import by_process, pairs, tms_simulated  # noqa: E402
from bench_support.plan import SMOKE  # noqa: E402
from bench_support.report import table  # noqa: E402
from bench_support.workshop import Place, Workshop, environments  # noqa: E402

FORM = {"name", "value", "unit", "ceiling", "ratio", "samples", "simulated", "device", "min", "max"}
BESIDE_PEER = [f"{kind}.{call}" for kind in ("default", "retained") for call in ("pause", "resume")]
MODEL = "sim.tms.h100-pcie5-kvcached"
PEER = {f"{of}.{name}" for of in ("tms", MODEL) for name in BESIDE_PEER}
OWN = {
    "pause.cold",
    "pause.warm.32",
    "pause.warm.1024",
    "resume.warm.32",
    "resume.warm.1024",
    "stall.own.p99_ms",
    "stall.own.max_ms",
    "stall.forwarded.vs_copy",
    "stall.seldom.vs_copy",
    "disk.write",
    "disk.write.fed",
    "disk.read",
    "disk.read.fed",
    "scale.ns_per_allocation",
    "trace.pair_ns",
    "hook.passthrough_ns",
    "hook.runtime_pair_ns",
    "hook.other_call_ns",
    "hook.lookup_ns",
    "hook.driver_pair_ns",
    "sim.h100-pcie5-kvcached.pause",
    "sim.h100-pcie5-kvcached.resume",
}
# What a library may not have yet; then the bench says so.
LATER = {"pause.clean.bytes_copied", "pause.clean.extra_us", "shared_backup.share", "file.read", "file.read.fed"}


def library(variable: str, name: str) -> str:
    """The library that `variable` names, else the release build of this checkout."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    path = Path(os.environ.get(variable) or target / "release" / name)
    if not path.is_file():
        pytest.skip(f"{name} is not built: scripts/build, or name it in {variable}")
    return str(path.resolve())


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "SIRE_ALLOC_SO": library("SIRE_ALLOC_SO", "libsire_alloc.so"),
        "SIRE_SIM_SO": library("SIRE_SIM_SO", "libsire_sim_cuda.so"),
        "SIRE_DRIVER_SO": library("SIRE_DRIVER_SO", "libsire_driver.so"),
    }
    command = [str(ROOT / "scripts" / "bench"), "--smoke", "--offline", "--device", "software", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("bench")
    written = folder / "figures.json"
    done = bench("--json", str(written), "--picture", str(folder / "bench.png"), "--disk-dir", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, {figure["name"]: figure for figure in json.loads(written.read_text())}


@pytest.mark.parametrize("script", ["bench", "api-reference"])
def test_of_several_pytorch_versions_the_newest_counts(tmp_path: Path, script: str) -> None:
    """As text 2.9 comes after 2.15, and for some hours all figures were those of an old PyTorch."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    for version in ("2.9.1", "2.15.0", "2.11.0"):
        python = tmp_path / ".sire" / f"env-{version}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\necho {version}\n")
        python.chmod(0o755)
    assert [path.name for path in environments(tmp_path)] == ["env-2.9.1", "env-2.11.0", "env-2.15.0"]
    kept = {
        name: value for name, value in os.environ.items() if name not in ("SIRE_TEST_PYTHON", "SIRE_BUILD_DOC_PYTHON")
    }
    environment = kept | {"SIRE_ALLOC_SO": "there", "SIRE_SIM_SO": "there"}
    done = subprocess.run(
        [str(tmp_path / "scripts" / script)], check=False, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "2.15.0\n"), done.stderr


def test_every_figure_is_there_or_says_why_not(smoke: tuple[str, dict[str, dict[str, Any]]]) -> None:
    text, figures = smoke
    absent = (OWN | PEER | LATER) - set(figures)
    # The peer needs its wheel, and raw O_DIRECT a file system that has it.
    assert absent <= PEER | LATER | {name for name in OWN if name.startswith("disk.")}
    for name in absent:
        group = "sim.tms" if name.startswith("sim.tms") else name.rpartition(".")[0]
        assert f"Not measured: {group}" in text or "Not measured: disk" in text
    for name in LATER - {"file.read"} & absent:
        assert "not built in this library" in text, name


def test_figures_have_the_agreed_form(smoke: tuple[str, dict[str, dict[str, Any]]]) -> None:
    text, figures = smoke
    for name, figure in figures.items():
        assert set(figure) >= FORM
        simulated = name.startswith("sim.")
        assert figure["simulated"] is simulated
        assert ("not a GPU" if simulated else "software") in figure["device"]
        assert simulated or "smoke" in figure["device"]
        assert figure["min"] <= figure["value"] <= figure["max"]
        # A difference may be negative, and no bytes are what is wanted.
        is_for_nothing = str(figure["target"]).endswith("≤ 0")
        assert figure["min"] > 0 or is_for_nothing or name.startswith(("pause.clean.", "pause.verified."))
        assert figure["samples"] >= 1
        assert (figure["ceiling"] is None) == (figure["ratio"] is None)
        assert f"| `{name}` |" in text
        if figure["ratio"] is not None:
            assert figure["ratio_min"] <= figure["ratio"] <= figure["ratio_max"]
    for name in OWN & set(figures):
        assert figures[name]["ceiling"] > 0


def test_figures_of_the_model_clock_are_judged_by_their_formula() -> None:
    found: dict[str, Any] = {"name": "sim.p.switch.clean", "unit": "s", "min": 1.0, "value": 1.02, "max": 1.1}
    found |= {"ceiling": 1.0, "bytes": 1 << 30, "device": "model clock, not a GPU"}
    figure = simulated_figures.figure(found)
    assert figure.met is True
    assert figure.as_json("this machine")["simulated"] is True
    assert simulated_figures.figure(found | {"value": 1.06}).met is False
    assert simulated_figures.figure(found | {"name": "sim.p.pause", "value": 1.06}).met is False
    assert simulated_figures.figure(found | {"name": "sim.p.pause", "value": 1.05}).met is True


def test_where_pinning_costs_something_the_peer_is_left_behind(smoke: tuple[str, dict[str, dict[str, Any]]]) -> None:
    """On the model clock the figures do not depend on the machine, so that the targets hold even here."""
    text, figures = smoke
    # Whatever else keeps the figures away is a failure.
    if re.search(r"Not measured: sim\.tms: torch_memory_saver \S+ is not installed", text):
        pytest.skip("torch_memory_saver is not installed beside this checkout")
    for call in ("pause", "resume"):
        figure = figures[f"{MODEL}.default.{call}"]
        assert figure["met"] is True, figure
        assert figure["max"] < 1.01 * figure["min"], figure
        assert "SIMULATED" in figure["notes"]


def test_times_of_a_gpu_are_not_called_simulated() -> None:
    shop = cast(Workshop, SimpleNamespace(software=False))
    with pytest.raises(Unmeasurable, match="only the software device keeps virtual time"):
        tms_simulated(shop, SMOKE, Place("a peer", Path("peer.so")))


@pytest.mark.parametrize("only", ["pause.cold", "pause.warm.32", "resume.warm.1024", "scale"])
def test_wrong_bytes_give_no_figure(only: str, tmp_path: Path) -> None:
    # The driver says that copies from the device succeed, and copies nothing: fast, and worth nothing.
    written = tmp_path / "figures.json"
    done = bench("--only", only, "--sabotage", "skip-copy", "--json", str(written))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG BYTES" in done.stderr
    assert json.loads(written.read_text()) == []
    assert "| `" not in done.stdout


def test_memory_that_stays_gives_no_figure(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    done = bench("--only", "pause.warm.32", "--sabotage", "unmap-only", "--json", str(written))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cudaMalloc" in done.stderr
    assert json.loads(written.read_text()) == []


def test_only_gives_that_figure_alone(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    done = bench("--only", "resume.warm.32", "--json", str(written), "--picture", str(tmp_path / "one.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [figure["name"] for figure in json.loads(written.read_text())] == ["resume.warm.32"]


def test_a_ratio_is_taken_per_pair() -> None:
    # Both sides half as fast in the second repetition: nothing has changed.
    figure = Figure("x", "GiB/s", [10.0, 5.0, 10.0], [20.0, 10.0, 20.0], target=Target("ratio", at_least=0.5))
    assert figure.ratio == 0.5
    assert figure.met is True
    assert Figure("x", "GiB/s", [9.0, 5.0], [20.0, 10.0], target=Target("ratio", at_least=0.5)).met is False


def test_an_unsteady_ceiling_is_not_judged_by() -> None:
    figure = Figure("x", "GiB/s", [10.0, 1.0], [20.0, 10.0], target=Target("ratio", at_least=0.9))
    figure.doubt([20.0, 10.0], "the disk", 1.5)
    assert figure.met is None
    assert "varied by 2.0x" in figure.meaningless[0]
    assert "not judged" in table([figure], {})
    figure = Figure("x", "GiB/s", [10.0], [20.0], target=Target("ratio", at_least=0.9))
    figure.doubt([20.0, 19.0], "the disk", 1.5)
    assert figure.met is False


def test_a_ceiling_that_is_passed_is_none() -> None:
    figure = Figure("x", "GiB/s", [30.0, 31.0], [20.0, 20.0], target=Target("ratio", at_least=0.9))
    assert figure.met is True
    figure.stay_below("the plain copy")
    assert figure.met is None


def stalls(*pairs: tuple[float, float]) -> Figure:
    """p99 in milliseconds, (beside a pause, beside a copy), by repetition."""
    values, copies = zip(*pairs, strict=True)
    return Figure("stall", "ms", values, copies, target=Target("ratio", at_most=1.0))


@pytest.mark.parametrize(
    ("whole", "running", "judged", "met"),
    [
        ([(2, 3), (2, 4)], [(1, 1), (9, 1)], 0.58, True),
        ([(2, 1), (2, 4)], [(0.5, 1), (0.7, 1)], 0.6, True),
        ([(1, 1), (1, 4)], [(2, 1), (2, 1)], 2.0, False),
        ([(2, 1), (2, 4)], [(0.5, 1), (0.5, 4)], 1.25, None),
        ([(2, 1), (2, 4)], [(0, 1), (0, 1e-9)], 1.25, None),
    ],
)
def test_a_loop_that_waits_for_a_processor_is_judged_without_that_wait(
    whole: list[tuple[float, float]], running: list[tuple[float, float]], judged: float, met: bool | None
) -> None:
    figure = steadier(stalls(*whole), stalls(*running))
    assert figure.ratio == pytest.approx(judged, abs=0.01)
    assert figure.met is met
    assert any("without the wait" in note for note in figure.notes) == (figure.ratio != stalls(*whole).ratio)


def test_calls_that_come_seldom_are_compared_with_the_same_calls_beside_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def waits(beside: str, whose: str) -> dict[str, float]:
        if whose != "seldom":
            return {"median": 10.0, "p99": 20.0, "worst": 30.0}
        # Of an allocation and a free the longer one counts.
        return {"pieces": {"median": 400.0, "p99": 700.0, "worst": 800.0}}.get(
            beside, {"median": 600.0, "p99": 700.0, "worst": 1200.0}
        )

    def fake(*_: object, **__: object) -> list[dict[str, object]]:
        lines: list[dict[str, object]] = []
        for beside in ("nothing", "pieces", "pause"):
            for whose in ("own", "forwarded", "seldom"):
                for call, share in (("allocate", 0.1), ("free", 1.0)):
                    for mark, value in waits(beside, whose).items():
                        name = f"stall/beside {beside}/{whose}/{call}/{mark}"
                        lines += [{"name": name + end, "value": value * share} for end in ("", "_running")]
        return lines

    monkeypatch.setattr(other_figures, "call", fake)
    seldom = other_figures.stall(cast(Workshop, SimpleNamespace(sire=None)), SMOKE)[-1]
    assert (seldom.name, seldom.value, seldom.ratio) == ("stall.seldom.vs_copy", 0.6, pytest.approx(1.5))
    assert any("1.20 ms, 1.50 of the ceiling's" in note for note in seldom.notes)


def test_less_can_be_better() -> None:
    assert Figure("x", "ms", [0.5, 0.9], target=Target("max", at_most=1.0)).met is True
    assert Figure("x", "ms", [0.5, 1.9], target=Target("max", at_most=1.0)).met is False


@pytest.mark.parametrize(
    ("reach", "of", "met"), [(0, 4, None), (0, 5, False), (3, 7, None), (1, 8, False), (24, 63, False), (25, 63, None)]
)
def test_a_coin_does_not_decide(reach: int, of: int, met: bool | None) -> None:
    figure = Figure(
        "x", "GiB/s", [1.0] * reach + [0.9] * (of - reach), [1.0] * of, target=Target("ratio", at_least=1.0)
    )
    assert figure.met is False
    figure.tell_tie()
    assert figure.met is met
    why = f"a tie: {reach} of {of} pairs reach it" if of > 4 else f"{of} pairs are too few to tell"
    assert figure.meaningless == ([] if met is False else [why])


@pytest.mark.parametrize(("reach", "met"), [(0, False), (2, None), (4, True)])
def test_a_coin_does_not_decide_where_less_is_better_either(reach: int, met: bool | None) -> None:
    values = [1.0] * reach + [1.1] * (7 - reach)
    figure = Figure("x", "us", values, [1.0] * 7, target=Target("ratio", at_most=1.0))
    figure.tell_tie()
    assert figure.met is met


def test_a_tie_of_processes_is_called_one() -> None:
    figure = Figure("x", "GiB/s", [1.0] * 3 + [0.9] * 4, [1.0] * 7, target=Target("ratio", at_least=1.0))
    figure.tell_tie("pairs of processes")
    assert figure.meaningless == ["a tie: 3 of 7 pairs of processes reach it"]


def took(*seconds: float) -> list[dict[str, float]]:
    return [{"pause": each} for each in seconds]


def test_what_two_processes_say_is_one_sample_however_many_pairs_they_do() -> None:
    # The first two disagree with all others, five times each.
    slow = (took(*[2.0] * 5), took(*[1.0] * 5))
    quick = (took(0.5, 0.4, 0.5), took(1.0, 1.0, 2.0))
    (ours, theirs), ratios = by_process([slow, quick, quick], "pause", 1 << 30)
    assert (ours, theirs) == ([0.5, 2.0, 2.0], [1.0, 1.0, 1.0])
    # Per pair first, then the median of the pairs: what is fast in one pair must not meet what is slow in another.
    assert ratios == [0.5, 2.5, 2.5]


class Fake:
    """A program that only notes its cycles: who, and whether the ceiling is last."""

    def __init__(self, name: str, done: list[tuple[str, bool]]) -> None:
        self.name, self.done = name, done

    def cycle(self, ceiling_last: bool) -> dict[str, float]:
        self.done.append((self.name, ceiling_last))
        return {"number": len(self.done)}


@pytest.mark.parametrize("turned", [False, True])
def test_every_other_pair_of_processes_does_everything_the_other_way_round(turned: bool) -> None:
    done: list[tuple[str, bool]] = []
    left, right = pairs(Fake("a", done), Fake("b", done), 5, turned)  # type: ignore[arg-type]
    assert (len(left), len(right)) == (6, 6)
    # The first of either process, then ABBA and so on.
    order = "ab" + "abba" + "baab" + "ab"
    assert "".join(name for name, _ in done) == (order.translate(str.maketrans("ab", "ba")) if turned else order)
    lasts = [last for _, last in done[::2]]
    assert lasts == [False, *(number % 2 == turned for number in range(1, 6))]


def test_pairs_of_the_only_processes_are_samples() -> None:
    (ours, theirs), ratios = by_process([(took(0.5, 1.0), took(1.0, 2.0))], "pause", 1 << 30)
    assert (ours, theirs, ratios) == ([2.0, 1.0], [1.0, 0.5], [2.0, 2.0])


def test_what_reaches_its_target_is_no_tie() -> None:
    figure = Figure("x", "GiB/s", [1.0, 1.1], [1.0, 1.0], target=Target("ratio", at_least=1.0))
    figure.tell_tie()
    assert figure.met is True


def test_single_outliers_among_many_make_no_ceiling_unsteady() -> None:
    assert spread([1.0, 2.0, 9.0]) == 9.0
    assert spread([1.0] + [2.0] * 8 + [90.0]) == 1.0
    assert spread([0.0] + [2.0] * 5) == math.inf


def test_a_target_that_a_bare_copy_does_not_reach_stays_and_is_said_to_be_out_of_reach() -> None:
    figure = Figure("x", "GiB/s", [2.8], [1.0], target=Target("ratio", at_least=4.0))
    figure.tell_limit([2.9, 3.0, 3.1], "a plain copy")
    assert figure.met is False
    assert figure.notes == ["out of reach here: a plain copy is itself only 3 times as fast"]
    within = Figure("x", "GiB/s", [2.8], [1.0], target=Target("ratio", at_least=2.0))
    within.tell_limit([3.0], "a plain copy")
    assert within.met is True
    assert not within.notes


def test_what_is_reached_was_not_out_of_reach() -> None:
    figure = Figure("x", "GiB/s", [1.04], [1.0], target=Target("ratio", at_least=1.0))
    figure.tell_limit([0.95], "a plain copy")
    assert figure.met is True
    assert not figure.notes


def test_nothing_measured_is_no_figure() -> None:
    with pytest.raises(Wrong):
        Figure("x", "ms", [])


def test_repetitions_alternate() -> None:
    assert ways(8) == [False, True, True, False, False, True, True, False]
    assert rates([2.0], 1 << 30) == [0.5]
