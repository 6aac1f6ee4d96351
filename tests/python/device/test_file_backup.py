"""A file that holds the weights already is their backup: no copy, no host memory, and never a wrong byte."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sire
import torch
from measure import MIB, command_or_skip, host_used, region_bytes, stranger
from weights import content, write


class Model(torch.nn.Module):
    """Sizes that are round and others, two dtypes, tied weights, buffers that are saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(1000, 512, dtype=torch.bfloat16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(512, 511, dtype=torch.bfloat16) for _ in range(4))
        self.norm = torch.nn.LayerNorm(511)
        self.head = torch.nn.Linear(512, 1000, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.arange(7))
        self.register_buffer("scratch", torch.arange(3.0), persistent=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def make(tag: str, path: Path) -> tuple[Model, dict[str, bytes]]:
    """A model in a region, its weights in a file, and what its bytes are. Tied weights are saved once, as usual."""
    with sire.region(tag, backup="file"):
        model = Model().to("cuda")
    state = model.state_dict()
    write(path, {name: each for name, each in state.items() if name != "head.weight"})
    return model, {name: content(each) for name, each in state.items()}


def check(model: Model, expected: dict[str, bytes]) -> None:
    for name, each in model.state_dict().items():
        assert content(each) == expected[name], name
    assert model.scratch.tolist() == [0.0, 1.0, 2.0]


def host_backups() -> int:
    return int(next(tier["used_bytes"] for tier in sire.stats()["tiers"] if tier["tier"] == "host"))


def test_weights_that_are_in_a_file_are_backed_up_nowhere_else(tag: str, path: Path) -> None:
    model, expected = make(tag, path)
    backup = sire.file_backup(model, path)
    assert len(backup.attached) == len(expected) - 1
    assert backup.bytes_attached == sum(len(each) for name, each in expected.items() if name != "head.weight")
    assert (dict(backup.skipped), backup.unused) == ({}, ())
    addresses = [each.data_ptr() for each in model.parameters()]
    for _ in range(3):
        report = sire.pause(tag)
        # The buffer that is not saved is the only thing that no file has.
        assert report.bytes_copied <= 16
        assert report.bytes_clean >= backup.bytes_attached
        figures = region_bytes(tag)
        assert figures["stored_bytes"] == backup.bytes_attached
        assert figures["resident_bytes"] == 0
        assert figures["backup_bytes"] - figures["stored_bytes"] <= 16
        assert host_backups() <= 512
        sire.resume(tag)
        check(model, expected)
    assert addresses == [each.data_ptr() for each in model.parameters()]


def test_large_weights_take_no_memory_of_the_process(tag: str, path: Path) -> None:
    with sire.region(tag, backup="file"):
        weights = {f"layer.{i}": torch.randn(8 * MIB // 4, device="cuda") for i in range(16)}
    write(path, weights)
    sire.file_backup(weights, path)
    sire.pause(tag)
    sire.resume(tag)
    before, backups = host_used(), host_backups()
    assert sire.pause(tag).bytes_copied == 0
    assert host_used() - before < 16 * MIB
    assert host_backups() == backups
    sire.resume(tag)


def test_what_was_trained_since_goes_to_host_memory(tag: str, path: Path) -> None:
    model, expected = make(tag, path)
    sire.file_backup(model, path)
    sire.pause(tag)
    sire.resume(tag)
    with torch.no_grad():
        model.layers[2].weight.add_(1)
    expected["layers.2.weight"] = content(model.layers[2].weight)
    assert sire.pause(tag).bytes_copied >= model.layers[2].weight.numel() * 2
    sire.resume(tag)
    check(model, expected)


@pytest.mark.parametrize("harm", ["changed", "truncated"])
def test_a_file_that_was_harmed_is_refused_until_it_is_back(tag: str, path: Path, harm: str) -> None:
    model, expected = make(tag, path)
    sire.file_backup(model, path)
    with sire.region(tag, backup="cpu"):
        other = torch.full((MIB,), 7, device="cuda")
    sire.pause(tag)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        if harm == "changed":
            file.seek(len(whole) - 9000)
            file.write(bytes(each ^ 1 for each in whole[-9000:-8000]))
        else:
            file.truncate(len(whole) // 2)
    for _ in range(2):
        with pytest.raises(sire.BackupIoError, match=re.escape(path.name)):
            sire.resume(tag)
        assert all(region["state"] == "paused" for region in sire.stats()["regions"] if region["tag"] == tag)
    with path.open("r+b") as file:
        file.write(whole)
    sire.resume(tag)
    check(model, expected)
    assert bool((other == 7).all())


def test_a_file_that_was_replaced_or_removed_is_still_there(tag: str, path: Path) -> None:
    model, expected = make(tag, path)
    sire.file_backup(model, path)
    sire.pause(tag)
    new = path.with_name("new")
    new.write_bytes(b"another model")
    new.replace(path)
    sire.resume(tag)
    path.unlink()
    sire.pause(tag)
    sire.resume(tag)
    check(model, expected)


def test_what_does_not_fit_is_named(tag: str, path: Path) -> None:
    with sire.region(tag, backup="file"):
        wide, tall = torch.zeros(6, 4, device="cuda"), torch.zeros(4, 6, device="cuda")
    outside = stranger(lambda: torch.zeros(4, device="cuda"))
    there = torch.zeros(4)
    write(path, {"wide": wide, "half": wide.half(), "flat": wide.flatten(), "turned": tall.t(), "outside": outside})
    for name, tensor, why in (
        ("missing", wide, "no file has a tensor 'missing'"),
        ("half", wide, r"it is float32 \[6, 4\], but F16 \[6, 4\]"),
        ("flat", wide, r"it is float32 \[6, 4\], but F32 \[24\]"),
        ("turned", tall.t(), "not contiguous"),
        ("outside", outside, "not allocated in a region"),
        ("outside", there, "it is on cpu"),
        ("outside", torch.empty(4, device="meta"), "it is on meta"),
    ):
        with pytest.raises(sire.InvalidArgumentError, match=f"{name}: .*{why}"):
            sire.file_backup({name: tensor}, path)
        backup = sire.file_backup({name: tensor, "wide": wide}, path, strict=False)
        assert list(backup.skipped) == ([] if tensor is wide else [name])
        assert backup.attached == ("wide",)
        assert "half" in backup.unused or name == "half"
    for wrong in (7, [1, 2], {"a": 1}, {1: wide}):
        with pytest.raises(sire.InvalidArgumentError):
            sire.file_backup(wrong, path)


def test_what_was_left_out_is_kept_in_host_memory(tag: str, path: Path) -> None:
    with sire.region(tag, backup="file"):
        one, other = torch.randn(MIB, device="cuda"), torch.randn(MIB, device="cuda")
    expected = content(one), content(other)
    write(path, {"one": one})
    backup = sire.file_backup({"one": one, "other": other}, path, strict=False)
    assert list(backup.skipped) == ["other"]
    report = sire.pause(tag)
    assert (report.bytes_copied, region_bytes(tag)["stored_bytes"]) == (4 * MIB, 4 * MIB)
    sire.resume(tag)
    assert (content(one), content(other)) == expected


def test_names_may_differ_and_files_may_be_several(tag: str, tmp_path: Path) -> None:
    with sire.region(tag, backup="file"):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).to("cuda")
    state = {f"model.{name}": each for name, each in model.state_dict().items()}
    parts = [tmp_path / f"part-{i}.safetensors" for i in range(2)]
    for i, part in enumerate(parts):
        write(part, {name: each for name, each in state.items() if name.startswith(f"model.{i}")})
    assert len(sire.file_backup(model, parts, names=lambda name: f"model.{name}").attached) == 4
    table = {name: f"model.{name}" for name in model.state_dict()}
    assert len(sire.file_backup(model.named_parameters(), map(str, parts), names=table).attached) == 4
    with pytest.raises(sire.InvalidArgumentError, match="4 tensors cannot"):
        sire.file_backup(model, parts)
    with pytest.raises(sire.InvalidArgumentError, match=r"is in .*part-0.* and in .*part-0"):
        sire.file_backup(model, [parts[0], parts[0]])


def test_other_regions_have_no_backups_in_files(tag: str, path: Path) -> None:
    with sire.region(tag, backup="cpu"):
        one = torch.zeros(MIB, device="cuda")
    write(path, {"one": one})
    with pytest.raises(sire.InvalidArgumentError, match='backup "file"'):
        sire.file_backup({"one": one}, path)


def test_an_automatic_backup_needs_no_room_for_what_a_file_holds(tag: str, path: Path) -> None:
    # Sizes for which PyTorch takes exactly as much: no free blocks lie between.
    with sire.region(tag, backup="auto"):
        weights = {f"layer.{i}": torch.randn(3 * MIB, device="cuda") for i in range(4)}
        state = torch.randn(3 * MIB, device="cuda")
    write(path, weights)
    size = sire.file_backup(weights, path).bytes_attached
    others = host_backups()
    for trained in (0, 0, 1):
        with torch.no_grad():
            weights["layer.1"].add_(trained)
            state.add_(1)
        expected = [content(each) for each in (*weights.values(), state)]
        report = sire.pause(tag)
        changed = trained * size // 4
        assert region_bytes(tag)["stored_bytes"] == size - changed
        assert report.bytes_clean >= size - changed
        assert report.bytes_copied == host_backups() - others == 12 * MIB + changed
        sire.resume(tag)
        assert [content(each) for each in (*weights.values(), state)] == expected
        # Nothing but the file is kept for the next pause.
        assert host_backups() == others


def test_files_of_the_formats_own_package(tag: str, path: Path) -> None:
    package = pytest.importorskip("safetensors.torch")
    with sire.region(tag, backup="file", immutable=True):
        model = torch.nn.TransformerEncoderLayer(128, 4, device="cuda", dtype=torch.float16)
    package.save_file(model.state_dict(), str(path), metadata={"format": "pt"})
    expected = {name: content(each) for name, each in model.state_dict().items()}
    size = sire.file_backup(model, os.fspath(path)).bytes_attached
    report = sire.pause(tag)
    assert (report.bytes_copied, report.bytes_hashed) == (0, size)
    sire.resume(tag)
    report = sire.pause(tag)
    assert (report.bytes_copied, report.bytes_hashed, report.bytes_clean) == (0, 0, size)
    sire.resume(tag)
    assert expected == {name: content(each) for name, each in model.state_dict().items()}


RECORDED = """
import sys
from pathlib import Path
import sire, torch
from weights import write
path = Path(sys.argv[1])
with sire.region("weights", backup="file"):
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 1023) for _ in range(4))).cuda()
with sire.region("cache", backup="cpu"):
    cache = torch.arange(1 << 20, device="cuda")
write(path, model.state_dict())
attached = sire.file_backup(model, path).bytes_attached
for _ in range(2):
    with sire.paused():
        pass
print(attached, len({each.data_ptr() for each in model.parameters()}), int(cache[-1]))
"""


def test_a_recorded_program_whose_weights_are_in_a_file_is_replayed(path: Path, tmp_path: Path) -> None:
    """Recorded from PyTorch; made again elsewhere, each byte compared after each resume, with the file and without."""
    command, recorded, figures = command_or_skip(), tmp_path / "recorded.trace", tmp_path / "figures.json"
    environment = os.environ | {"SIRE_TRACE": str(recorded), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-c", RECORDED, str(path)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    attached, tensors, last = map(int, done.stdout.split())
    assert (tensors, last) == (8, (1 << 20) - 1)

    def replay() -> str:
        replayed = [str(command), "replay", str(recorded), "--device", "software", "--check", "--json", str(figures)]
        variables = os.environ | {"LD_PRELOAD": "", "TMPDIR": str(tmp_path)}
        done = subprocess.run(replayed, env=variables, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "0 failed" in done.stderr
        assert "0 allocations wrong" in done.stderr
        found = {figure["name"]: figure for figure in json.loads(figures.read_text())}
        assert found["replay.attach_file"]["samples"] == tensors
        # What the file has is not copied, the other region is.
        moved, copied = (found["replay.pause"][name] for name in ("bytes_moved", "bytes_copied"))
        assert 2 * 8 * MIB <= copied <= moved - 2 * attached
        return done.stderr

    assert f"{path} ({path.stat().st_size} bytes): the recorded file itself" in replay()
    path.unlink()
    assert "made here, content generated" in replay()
