"""The suite that runs on machines with a GPU, run here: its parts alone, and its first steps on the software device.

What needs the stand-in is skipped where none is built; name its folder (with libcuda.so.1 and libcudart.so.13) in
SIRE_TEST_STAND_IN to choose one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu_suite_support import child, elf  # noqa: E402
from gpu_suite_support.context import Context  # noqa: E402
from gpu_suite_support.main import chosen  # noqa: E402
from gpu_suite_support.probes.ask import all_questions  # noqa: E402
from gpu_suite_support.report import Report  # noqa: E402
from gpu_suite_support.steps import STEPS, kit, pytests, saver  # noqa: E402
from gpu_suite_support.steps.interference import judge  # noqa: E402
from gpu_suite_support.steps.kit import PARTS  # noqa: E402

LEFT_OUT = {"transfer": ["retained.128MiB.x16", "serial.128MiB.x1"], "switch": ["dirty", "clean"]}
FIGURE_FIELDS = {"name", "value", "unit", "simulated", "device"}


def built(name: str) -> Path | None:
    """The newest build of a library in this checkout."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    found = [path for kind in ("release", "debug") if (path := target / kind / name).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that holds the library and a stand-in under NVIDIA's names."""
    library, stand_in = built("libsire_alloc.so"), built("libsire_sim_cuda.so")
    named = os.environ.get("SIRE_TEST_STAND_IN")
    if named:
        stand_in = (Path(named) / "libcuda.so.1").resolve()
    if library is None or stand_in is None:
        pytest.skip("libsire_alloc.so and libsire_sim_cuda.so are not built: scripts/build")
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "libsire_alloc.so").symlink_to(library)
    (folder / "stand-in").mkdir()
    for name in ("libcuda.so.1", "libcudart.so.13", "libnvidia-ml.so.1"):
        (folder / "stand-in" / name).symlink_to(stand_in)
    return folder


def suite(bundle: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Runs the suite without PyTorch, and returns its JSON."""
    command = [
        ROOT / "scripts" / "gpu-suite",
        "--device",
        "software",
        "--bundle",
        bundle,
        "--out",
        out,
        "--python",
        sys.executable,
    ]
    subprocess.run([*map(str, command), *arguments], capture_output=True, text=True, timeout=240, check=False)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="session")
def result(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The two quick steps that need no PyTorch."""
    return suite(bundle, tmp_path_factory.mktemp("out") / "result.json", "--only", "environment,questions")


def test_the_result_has_the_documented_form(result: dict[str, Any]) -> None:
    assert result["schema"] == 1
    assert result["finished"] is True
    assert result["device"] == "software"
    assert result["simulated"] is False
    assert [step["name"] for step in result["steps"]] == ["environment", "questions"]
    for check in result["checks"]:
        assert set(check) == {"name", "passed", "detail", "seconds"}
        assert isinstance(check["passed"], bool)
    for figure in result["figures"]:
        assert figure.keys() >= FIGURE_FIELDS
        assert figure["simulated"] is False
        assert figure["device"] == "software"


def test_the_library_is_identified(result: dict[str, Any]) -> None:
    library = result["environment"]["library"]
    assert len(library["sha256"]) == 64
    assert library["abi"] == 1
    assert len(library["build_id"]) == 16
    assert not [name for name in library["needed"] if "cuda" in name]


def test_every_question_is_answered_on_the_software_device(result: dict[str, Any]) -> None:
    answers = {answer["name"]: answer for answer in result["answers"]}
    assert set(answers) == set(all_questions())
    unanswered = {name: answer["data"] for name, answer in answers.items() if answer["answer"] is None}
    assert set(unanswered) <= {"kernel_unmapped", "vmm_cost_beside_copy"}, unanswered
    assert answers["granularity"]["answer"] == 2 << 20
    assert answers["graph_replay_after_remap"]["answer"] is True
    assert answers["retained_handle"]["answer"]["kept"] is True
    lives = [answers["attributes"]["data"][flag] for flag in ("without_rdma_flag", "with_rdma_flag")]
    assert all(set(life.values()) == {"CUDA_SUCCESS (0)"} for life in lives), lives
    alone = answers["pointer_attributes"]["data"]["its_address_range"]
    assert alone == {"result": "CUDA_SUCCESS (0)", "offset": 2 << 20, "size": 2 << 20}
    for thread in ("thread", "meanwhile"):
        relaxed = answers[f"capture_global_relaxed_{thread}"]["answer"]
        assert relaxed["spoil_the_capture"] == ["ctx_synchronize"]
        assert {"create", "map", "set_access", "unmap", "host_register", "event_query"} <= set(relaxed["allowed"])


def test_the_suite_passes_on_the_software_device(bundle: Path, tmp_path: Path) -> None:
    # What needs neither PyTorch nor a compiler; scripts/test runs what the other steps hold by itself.
    steps = "conformance,timings,interference"
    found = suite(bundle, tmp_path / "result.json", "--only", steps, "--budget", "90")
    assert found["finished"] is True
    assert [step["name"] for step in found["steps"]] == steps.split(",")
    checks = {check["name"]: check for check in found["checks"]}
    if "no conformance binary" in checks["conformance"]["detail"]:  # of a build without tests
        del checks["conformance"]
    else:
        assert len([name for name in checks if name.startswith("conformance.")]) >= 1
    assert len([name for name in checks if name.startswith("timings.")]) == 4
    assert len([name for name in checks if name.startswith("interference.")]) == 5
    assert not {name: check["detail"] for name, check in checks.items() if not check["passed"]}
    rates = [figure for figure in found["figures"] if figure["name"].startswith(("pause.", "resume."))]
    assert rates
    assert all(figure["ratio"] > 0 for figure in rates if "ceiling" in figure)


def test_the_kit_measures_and_compares_every_byte(bundle: Path, tmp_path: Path) -> None:
    found = suite(bundle, tmp_path / "result.json", "--only", "kit", "--budget", "150")
    checks = {check["name"]: check for check in found["checks"]}
    assert set(checks) == {f"kit.{part}" for part in PARTS}
    assert not {name: check["detail"] for name, check in checks.items() if not check["passed"]}
    names = {figure["name"] for figure in found["figures"]}
    for name in (
        "limit.to_host.64KiB",
        "limit.duplex.efficiency",
        "vmm.kit.create.after_a_full_device",
        "vmm.kit.unmap.beside_a_kernel",
        "pinning.kit.touch.2_threads",
        "kit.pause.retained.128MiB.x16.warm",
        "kit.resume.serial.128MiB.x16.cold",
        "limit.to_device.small_pages",
        "kit.pause.serial_kept.128MiB.x1.warm",
        "kit.switch.serial.dirty",
        "kit.switch.switch.clean",
        "kit.switch.ahead.dirty.first",
        "kit.fills.beside_pause",
        "kit.disk.pause",
    ):
        assert name in names, name
    transfers = [figure for figure in found["figures"] if figure["name"].startswith(("kit.pause.", "kit.resume."))]
    assert all(figure["ratio"] > 0 for figure in transfers if ".discard." not in figure["name"])
    for figure in transfers:
        # What the parts tell is of one cycle, and inside of what it took.
        longest = figure["maximum"] / 1e3 if figure["unit"] == "ms" else figure["bytes"] / figure["minimum"] / 1e9
        assert 0 < sum(figure["parts"].values()) <= longest, figure
    timelines = [figure for figure in found["figures"] if figure["name"].endswith(".timeline")]
    assert len(timelines) == 6
    for figure in timelines:
        name, line = figure["name"], figure["milliseconds_free_ready"]
        assert line == sorted(line), name
        assert any(ready for _, _, ready in line) == (".ahead." in name), name


def test_what_there_is_no_time_for_is_left_out_with_a_note(bundle: Path) -> None:
    asked = ["--driver", bundle / "stand-in" / "libcuda.so.1", "--library", bundle / "libsire_alloc.so"]
    for part in ("transfer", "switch"):
        command = [sys.executable, "-m", "gpu_suite_support.probes.kit", part, *asked, "--seconds", "0"]
        env = os.environ | {"PYTHONPATH": str(ROOT / "scripts"), "SIRE_SIM_MEMORY": "2GiB"}
        told = child.last_json(child.run([*map(str, command)], env=env, timeout=60).output)
        assert told is not None
        assert not told["figures"]
        assert all("left out: it takes about" in told["notes"][name] for name in LEFT_OUT[part]), told["notes"]


def test_wrong_bytes_are_found_by_every_worker(bundle: Path) -> None:
    body = """
from gpu_suite_support.probes.content import BLOCK, Content
from gpu_suite_support.probes.cuda import Cuda
cuda = Cuda(DRIVER)
places = [cuda.mapped(3 * BLOCK)[0] for _ in range(2)]
content = Content(cuda, 4)
content.write(places, 3 * BLOCK)
assert content.wrong_blocks(places, 3 * BLOCK) == []
for block in (1, 2, 5):
    cuda.need("cuMemsetD8_v2", places[block // 3] + block % 3 * BLOCK + BLOCK - 1, 1, 1)
    cuda.need("cuMemsetD8_v2", places[block // 3] + block % 3 * BLOCK + BLOCK - 2, 2, 1)
assert content.wrong_blocks(places, 3 * BLOCK) == [1, 2, 5]
"""
    driver = str(bundle / "stand-in" / "libcuda.so.1")
    env = os.environ | {"PYTHONPATH": str(ROOT / "scripts"), "SIRE_SIM_MEMORY": "1GiB"}
    outcome = child.run([sys.executable, "-c", body.replace("DRIVER", repr(driver))], env=env, timeout=60)
    assert outcome.ok, outcome.tail()


def test_wrong_bytes_fail_the_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"figures": [], "wrong": ["retained: block 3"], "notes": {}}
    ended = child.Outcome(0, timed_out=False, output=json.dumps(told), seconds=1.0)
    monkeypatch.setattr(child, "run", lambda *_, **__: ended)
    report = Report(tmp_path / "out.json", "software")
    context = Context("software", tmp_path / "libsire_alloc.so", None, sys.executable, tmp_path, time.monotonic() + 60)
    kit.run(context, report)
    assert len(report.failed) == len(PARTS)
    assert all("WRONG BYTES" in check["detail"] and "block 3" in check["detail"] for check in report.checks)


ONE_MODE = "import os, pytest\ndef test_one():\n    if os.environ['SIRE_TEST_MODE'] == 'torch': pytest.skip()"
NO_MODE = "import pytest\ndef test_one(): pytest.skip()"


@pytest.mark.parametrize(
    ("body", "failing"),
    [
        (ONE_MODE, set()),
        (NO_MODE, {"python.test_a.ran"}),
        ("", {"python.preload.test_a", "python.torch.test_a", "python.test_a.ran"}),
    ],
)
def test_a_file_that_runs_in_no_mode_fails(
    body: str, failing: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tests" / "python"
    (folder / "device").mkdir(parents=True)
    (folder / "device" / "test_a.py").write_text(body)
    (folder / "test_b.py").write_text("def test_two(): pass")
    monkeypatch.setattr(pytests, "ROOT", tmp_path)
    monkeypatch.setattr(Context, "env", lambda *_, **__: dict(os.environ))
    report = Report(tmp_path / "out.json", "software")
    context = Context("software", tmp_path / "libsire_alloc.so", None, sys.executable, tmp_path, time.monotonic() + 60)
    pytests.run(context, report)
    assert {check["name"] for check in report.checks if not check["passed"]} == failing


def test_the_table_of_questions_is_complete() -> None:
    # docs/software-device.md says what the software device assumes for each question.
    page = (ROOT / "docs" / "software-device.md").read_text()
    missing = [name for name in all_questions() if f"`{name}`" not in page]
    assert not missing, f"docs/software-device.md does not name {missing}"


def test_a_child_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "grandchild"
    script = f"sleep 3 && touch {marker} & sleep 60"
    start = time.monotonic()
    outcome = child.run(["/bin/sh", "-c", script], env=dict(os.environ), timeout=0.3)
    assert outcome.timed_out
    assert not outcome.ok
    assert time.monotonic() - start < 30, "it was waited for"
    time.sleep(3.2)
    assert not marker.exists(), "a grandchild outlived the time limit"


def test_a_child_that_dies_is_told_from_one_that_fails() -> None:
    died = child.run(["/bin/sh", "-c", "kill -SEGV $$"], env=dict(os.environ), timeout=10)
    failed = child.run(["/bin/sh", "-c", "echo why; exit 3"], env=dict(os.environ), timeout=10)
    assert died.how() == "died of SIGSEGV"
    assert (failed.status, failed.tail()) == (3, "exited with 3\nwhy")
    assert child.run(["/no/such/program"], env={}, timeout=1).status == 127


def test_results_survive_a_run_that_is_cut_off(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json", "cuda", shorten={"/some/where": "."})
    report.check("first", False, "in /some/where/x")
    report.figure("speed", 5.0, "GB/s", ceiling=10.0, samples=3)
    report.check("second", True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["finished"] is False
    assert found["passed"] is False
    assert [check["passed"] for check in found["checks"]] == [False, True]
    assert found["checks"][0]["detail"] == "in ./x"
    assert found["figures"] == [
        {
            "name": "speed",
            "value": 5.0,
            "unit": "GB/s",
            "ceiling": 10.0,
            "ratio": 0.5,
            "samples": 3,
            "simulated": False,
            "device": "cuda",
        }
    ]


def test_elf_reading_agrees_with_the_loader() -> None:
    assert any(name.startswith("libc.so") for name in elf.needed(Path(sys.executable).resolve()))
    assert elf.needed(Path(__file__)) == []


def test_the_peer_that_a_bundle_carries_is_known(tmp_path: Path) -> None:
    there = Context("software", Path("library"), tmp_path, "python3", tmp_path, 0.0)
    without = Context("software", Path("library"), None, "python3", tmp_path, 0.0)
    assert (saver.carried(there), saver.version_in(saver.carried(without))) == (None, None)
    described = tmp_path / "peer" / "torch_memory_saver-0.0.10.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_memory_saver\nVersion: 0.0.10\n")
    assert saver.version_in(saver.carried(there)) == "0.0.10"


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(SystemExit, match="no step nonsense"):
        chosen("environment,nonsense")
    assert chosen("") == list(STEPS)


def seen(**changes: Any) -> dict[str, Any]:
    """What the owner sees when all is well, but for `changes`."""
    good: dict[str, Any] = {
        "first_resume": {"status": 2},
        "resume_with_wait": {"status": 2},
        "waited": 0.5,
        "last_resume": {"status": 0},
        "leaked_by_failed_resume": 0,
        "wrong": [],
        "expected_status": 2,
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, set()),
        ({"first_resume": {"status": 0}}, {"resume_without_room_is_refused"}),
        ({"leaked_by_failed_resume": 1 << 21}, {"failed_resume_keeps_no_memory"}),
        ({"waited": 0.0}, {"wait_budget_is_kept"}),
        ({"last_resume": {"status": 2}, "wrong": None}, {"resume_works_when_memory_is_free", "every_byte_survives"}),
        ({"wrong": [3]}, {"every_byte_survives"}),
    ],
)
def test_interference_is_judged(changes: dict[str, Any], failing: set[str]) -> None:
    assert {name for name, passed, _ in judge(seen(**changes)) if not passed} == failing
