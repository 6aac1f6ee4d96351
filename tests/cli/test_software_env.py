"""`sire software-env`: refusals, running programs, and what pip may and may not do in it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Sire, clean_environment

REAL_PACKAGES = ("nvidia-", "cuda-", "triton", "pytorch-triton")


def libraries(environment: Path) -> Path:
    [library] = environment.glob("lib/python3*/site-packages/nvidia/*/lib/libsire_sim_cuda.so")
    return library.parent


def picture(folder: Path) -> dict[str, tuple[str, str]]:
    """Every file's link target and content, by name."""
    return {path.name: (str(path.readlink()) if path.is_symlink() else "", hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())}


def test_a_foreign_directory_is_not_touched(sire: Sire, stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    done = sire("software-env", tmp_path, "--stand-in", stand_in)
    assert done.returncode == 1
    assert "not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_not_a_directory(sire: Sire, stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = sire("software-env", tmp_path / "file", "--stand-in", stand_in)
    assert done.returncode == 1
    assert "not a directory" in done.stderr


def test_without_a_stand_in_nothing_is_made(lonely: Sire, tmp_path: Path) -> None:
    done = lonely("software-env", tmp_path / "env")
    assert done.returncode == 1
    assert "libsire_sim_cuda.so was not found" in done.stderr
    assert "SIRE_SIM_LIBRARY" in done.stderr
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_a_python_that_does_not_run(sire: Sire, stand_in: Path, tmp_path: Path, python: str) -> None:
    done = sire("software-env", tmp_path / "env", "--python", python, "--stand-in", stand_in)
    assert done.returncode == 1
    assert "--python" in done.stderr


@pytest.mark.parametrize("action", [["info"], ["exec", "--", "true"]])
def test_an_environment_that_is_not_there(sire: Sire, tmp_path: Path, action: list[str]) -> None:
    done = sire("software-env", tmp_path / "env", *action)
    assert done.returncode == 1
    assert "sire software-env" in done.stderr, "it says how to make one"


def test_offline_names_what_is_missing_and_a_half_made_directory_is_known(sire: Sire, stand_in: Path, tmp_path: Path) -> None:
    done = sire("software-env", tmp_path / "env", "--offline", "--torch", "2.15.0", "--stand-in", stand_in, PIP_FIND_LINKS=tmp_path)
    assert done.returncode == 1
    assert "install torch 2.15.0" in done.stderr
    assert "--offline" in done.stderr
    half = sire("software-env", tmp_path / "env", "exec", "--", "true")
    assert half.returncode == 1
    assert "half made" in half.stderr


@pytest.mark.parametrize("code", [0, 3])
def test_exec_passes_exit_codes(sire: Sire, environment_dir: Path, code: int) -> None:
    assert sire("software-env", environment_dir, "exec", "--", "sh", "-c", f"exit {code}").returncode == code


def test_exec_runs_the_environments_python_on_the_device(sire: Sire, environment_dir: Path, tmp_path: Path) -> None:
    code = """
import ctypes, sys
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
assert driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
print(sys.prefix, count.value)
"""
    done = sire(
        "software-env", environment_dir, "exec", "--device-memory", "1GiB", "--devices", "2", "--", "python", "-c", code,
        SIRE_SIM_DIR=tmp_path,
    )  # fmt: skip
    assert done.stdout == f"{environment_dir} 2\n", done.stderr


def test_exec_refuses_what_is_no_size(sire: Sire, environment_dir: Path) -> None:
    done = sire("software-env", environment_dir, "exec", "--device-memory", "lots", "--", "true")
    assert done.returncode == 2
    assert "8GiB" in done.stderr


def test_the_stand_in_lies_there_once_under_every_name(environment_dir: Path) -> None:
    folder = libraries(environment_dir)
    cuda = 13 if folder.parent.name == "cu13" else 12
    names = (ROOT / f"crates/sire-sim-cuda/sonames-cuda{cuda}.txt").read_text().split()
    assert {path.name for path in folder.iterdir()} == {*names, "libsire_sim_cuda.so"}
    assert all((folder / name).is_symlink() for name in names)
    assert len({(folder / name).resolve() for name in names}) == 1


def test_info_agrees_with_sha256sum(sire: Sire, environment_dir: Path) -> None:
    done = sire("software-env", environment_dir, "info", "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["stand_in_intact"] is True
    assert info["marker"]["stand_in_sha256"] == hashlib.sha256(Path(info["stand_in"]).read_bytes()).hexdigest()
    assert any(entry.startswith("triton==") for entry in info["marker"]["empty"])


def test_torch_there_is_the_unmodified_wheel(environment_dir: Path) -> None:
    """Every file of the wheel has the hash that the wheel's own record gives."""
    code = """
import base64, hashlib, importlib.metadata
checked = 0
for file in importlib.metadata.distribution("torch").files:
    if file.hash and str(file).startswith("torch/lib/"):
        digest = hashlib.file_digest(open(file.locate(), "rb"), file.hash.mode).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file
        checked += 1
print(checked)
"""
    done = subprocess.run([str(environment_dir / "bin/python"), "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


def test_pip_is_content(environment_dir: Path) -> None:
    done = subprocess.run(
        [str(environment_dir / "bin/python"), "-m", "pip", "check"], env=clean_environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout


USERS_OF_TORCH = ("accelerate", "peft", "transformers", "diffusers")


def distributions(environment: Path) -> dict[str, list[str]]:
    """Every installed distribution's files, by its name."""
    code = """
import importlib.metadata, json
print(json.dumps({each.metadata["Name"].lower(): [str(file) for file in each.files or []] for each in importlib.metadata.distributions()}))
"""
    done = subprocess.run([str(environment / "bin/python"), "-c", code], capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_installing_what_uses_torch_leaves_the_stand_in_alone(environment_dir: Path) -> None:
    """Beside a torch without its dependencies, pip would plan every NVIDIA wheel and triton, into the stand-in's paths."""
    before = picture(libraries(environment_dir))
    planned = subprocess.run(
        [str(environment_dir / "bin/python"), "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *USERS_OF_TORCH],
        env=clean_environment(PIP_DISABLE_PIP_VERSION_CHECK="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if planned.returncode != 0 and ("No matching distribution" in planned.stderr or "Could not find a version" in planned.stderr):
        pytest.skip(f"no package index to plan with: {planned.stderr.strip().splitlines()[-1]}")
    assert planned.returncode == 0, planned.stderr
    names = [item["metadata"]["name"].lower() for item in json.loads(planned.stdout)["install"]]
    assert [name for name in names if name.startswith((*REAL_PACKAGES, "torch"))] == []
    assert set(USERS_OF_TORCH) <= {*names, *distributions(environment_dir)}, "what is not there already is planned"
    assert picture(libraries(environment_dir)) == before


def test_what_stands_for_nvidias_packages_is_empty(environment_dir: Path) -> None:
    """Also after whatever was installed there since: no real package has come over the stand-in."""
    named = {name: files for name, files in distributions(environment_dir).items() if name.startswith(REAL_PACKAGES)}
    assert any(name.startswith("triton") for name in named)
    assert any(name.startswith(("nvidia-", "cuda-")) for name in named)
    full = {name: [file for file in files if ".dist-info/" not in file] for name, files in named.items()}
    assert {name: files for name, files in full.items() if files} == {}


def test_running_again_changes_nothing_and_needs_no_network(sire: Sire, environment_dir: Path) -> None:
    info = json.loads(sire("software-env", environment_dir, "info", "--json").stdout)
    before = picture(libraries(environment_dir))
    done = sire("software-env", environment_dir, "--offline", "--torch", info["marker"]["torch"], "--stand-in", info["stand_in"], PIP_FIND_LINKS=None)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stderr or "op layer" in done.stderr
    assert picture(libraries(environment_dir)) == before
