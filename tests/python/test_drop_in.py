"""The drop-in for torch_memory_saver: its names, its tolerance, and how it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sire
from sire import torch_memory_saver as module
from sire.torch_memory_saver import TorchMemorySaver, register_hook_mode

from fake_library import FakeLibrary

SOURCE = Path(sire.__file__).resolve().parents[1]
COMPAT = SOURCE.parent / "compat" / "src"


@dataclass
class Tensor:
    """As much of a CUDA tensor of bytes as is looked at."""

    address: int
    count: int
    is_cuda = True
    shape = property(lambda self: (self.count,))

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int]:
        return (1,)

    def numel(self) -> int:
        return self.count

    def element_size(self) -> int:
        return 1


@pytest.fixture
def saver(library: FakeLibrary) -> TorchMemorySaver:
    return TorchMemorySaver()


def test_regions_map_to_policies(library: FakeLibrary, saver: TorchMemorySaver) -> None:
    with saver.region():
        assert library.tags_inside() == ["default"]
    with saver.region("w", enable_cpu_backup=True, cpu_backup_backend="pinned"):
        pass
    with saver.region(tag="d", enable_disk_backup=True):
        pass
    assert [each[:2] for each in library.regions] == [("default", 0), ("w", 1), ("d", 2)]


def test_contradictions_are_refused(saver: TorchMemorySaver) -> None:
    for options in (
        {"enable_cpu_backup": True, "enable_disk_backup": True},
        {"cpu_backup_backend": "pinned"},
        {"enable_cpu_backup": True, "cpu_backup_backend": "tape"},
    ):
        with pytest.raises(ValueError, match="backup"):
            saver.region("a", **options)  # type: ignore[arg-type]


def test_the_backend_is_the_kind_of_host_memory(
    library: FakeLibrary, saver: TorchMemorySaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pageable(**options: object) -> bool:
        with saver.region("w", **options):  # type: ignore[arg-type]
            return library.regions[library.region_current() or 0][5]

    assert not pageable(enable_cpu_backup=True)
    assert pageable(enable_cpu_backup=True, cpu_backup_backend="mmap")
    monkeypatch.setenv("TMS_INIT_CPU_BACKUP_BACKEND", "mmap")
    assert pageable(enable_cpu_backup=True)
    assert not pageable(enable_cpu_backup=True, cpu_backup_backend="pinned")
    assert not pageable(enable_disk_backup=True)
    assert not pageable()
    monkeypatch.setenv("TMS_INIT_CPU_BACKUP_BACKEND", "tape")
    with pytest.raises(ValueError, match="TMS_INIT_CPU_BACKUP_BACKEND"):
        saver.region("w", enable_cpu_backup=True)


def test_only_memory_of_regions_is_kept_resident(library: FakeLibrary, saver: TorchMemorySaver) -> None:
    library.allocations = {0x1000: 4096}
    assert saver.keep_resident(Tensor(0x1100, 10)) == 4096
    assert library.settings["kept_resident"] == {0x1000}
    assert saver.keep_resident(Tensor(0x1100, 0)) == 0
    assert saver.keep_resident(Tensor(0x9000, 10)) == 0
    with pytest.raises(sire.InvalidArgumentError, match="keep_resident takes a tensor"):
        saver.keep_resident(None)


def test_unused_tags_and_repetition_are_not_errors(library: FakeLibrary, saver: TorchMemorySaver) -> None:
    saver.pause("nobody")
    saver.resume("nobody")
    with saver.region("a"):
        pass
    saver.pause("a")
    saver.pause("a")
    assert library.paused == {0}
    saver.resume("")
    assert library.paused == set()


def test_settings(
    library: FakeLibrary, saver: TorchMemorySaver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert saver.enabled is True
    saver.memory_margin_bytes = 1 << 20
    assert library.settings["margin"] == 1 << 20
    with pytest.raises(NotImplementedError):
        _ = saver.memory_margin_bytes
    saver.set_disk_backup_dir(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir()
    assert saver.retain_cpu_backup is False
    monkeypatch.setenv("TMS_RETAIN_CPU_BACKUP", "1")
    assert saver.retain_cpu_backup is True
    with saver.region("kept", enable_cpu_backup=True):
        pass
    assert library.regions[-1] == ("kept", 1, False, True, 0, False, False)
    saver.hook_mode = "torch"
    assert saver.hook_mode == "torch"


def test_the_module_answers_to_the_same_verbs(library: FakeLibrary) -> None:
    with module.region(tag="a"):
        assert library.tags_inside() == ["a"]
    module.pause("a")
    module.resume()
    module.hook_mode = "torch"
    assert module.torch_memory_saver.hook_mode == "torch"
    assert "hook_mode" not in vars(module)


def test_custom_hook_modes(library: FakeLibrary, saver: TorchMemorySaver) -> None:
    class Custom:
        calls: list[str | None] = []

        def pause(self, tag: str | None) -> None:
            self.calls.append(tag)

    made: list[Custom] = []
    register_hook_mode("custom", lambda: made.append(Custom()) or made[0], uses_preload=False)  # type: ignore[func-returns-value]
    saver.hook_mode = "custom"
    assert made == []
    saver.pause("t")
    saver.pause()
    assert made[0].calls == ["t", None]
    with pytest.raises(sire.InvalidArgumentError):
        register_hook_mode("torch", Custom)


class Mode:
    """A custom hook mode that takes what the newest release of torch_memory_saver passes, or only what all do."""

    def __init__(self) -> None:
        self.opened: list[dict[str, object]] = []

    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool, enable_disk_backup: bool = False) -> Iterator[None]:
        self.opened.append({"tag": tag, "cpu": enable_cpu_backup, "disk": enable_disk_backup})
        yield

    def pause(self, tag: str | None) -> None:
        self.opened.append({"paused": tag})


class OlderMode(Mode):
    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool) -> Iterator[None]:  # type: ignore[override]
        with super().region(tag, enable_cpu_backup):
            yield


def test_each_hook_mode_has_an_implementation_of_its_own(library: FakeLibrary, saver: TorchMemorySaver) -> None:
    """The first one that was made served every mode that was chosen later."""
    made: dict[str, list[Mode]] = {"one": [], "two": []}
    for name, modes in made.items():
        register_hook_mode(name, lambda modes=modes: modes.append(Mode()) or modes[-1])  # type: ignore[misc]
    for name in ("one", "two", "one"):
        saver.hook_mode = name
        saver.pause(name)
    assert {name: [mode.opened for mode in modes] for name, modes in made.items()} == {
        "one": [[{"paused": "one"}, {"paused": "one"}]],
        "two": [[{"paused": "two"}]],
    }
    register_hook_mode("one", OlderMode)
    saver.pause("again")
    assert len(made["one"][0].opened) == 2, "it was registered anew"


def test_a_hook_mode_gets_every_argument_or_it_is_said_that_it_takes_none(
    library: FakeLibrary, saver: TorchMemorySaver
) -> None:
    """A disk backup was asked for, and left out."""
    mode = Mode()
    register_hook_mode("newer", lambda: mode)
    register_hook_mode("older", OlderMode)
    saver.hook_mode = "newer"
    with saver.region("w", enable_disk_backup=True):
        assert mode.opened == [{"tag": "w", "cpu": False, "disk": True}]
    with pytest.raises(sire.UnsupportedError, match="'newer' takes no cpu_backup_backend"):
        saver.region("w", enable_cpu_backup=True, cpu_backup_backend="mmap")
    saver.hook_mode = "older"
    with saver.region("w", enable_cpu_backup=True):
        pass
    with pytest.raises(sire.UnsupportedError, match="'older' takes no enable_disk_backup"):
        saver.region("w", enable_disk_backup=True)


def _python(code: str, *paths: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IMPORTS = """
import torch_memory_saver
from torch_memory_saver import torch_memory_saver as object_, TorchMemorySaver, configure_subprocess
from torch_memory_saver.utils import get_binary_path_from_package
from torch_memory_saver.testing_utils import get_and_print_gpu_memory
from torch_memory_saver.hooks.mode_preload import configure_subprocess as same
import sire.torch_memory_saver
assert torch_memory_saver is sire.torch_memory_saver and same is configure_subprocess
assert isinstance(object_, TorchMemorySaver)
import sys
assert "torch" not in sys.modules
print("served")
"""


def test_compat_makes_the_module_importable() -> None:
    assert _python("import sire.compat; sire.compat.enable(); sire.compat.enable()" + IMPORTS, SOURCE) == "served"


def test_the_second_distribution_ships_the_module() -> None:
    assert _python(IMPORTS, SOURCE, COMPAT) == "served"
    assert _python("import sire.compat; sire.compat.enable()" + IMPORTS, SOURCE, COMPAT) == "served"


def test_compat_does_not_replace_the_real_package(tmp_path: Path) -> None:
    (tmp_path / "torch_memory_saver.py").write_text("real = True\n")
    code = """
import torch_memory_saver, sire.compat
try:
    sire.compat.enable()
except RuntimeError as error:
    print(error)
assert torch_memory_saver.real
"""
    assert "imported already" in _python(code, SOURCE, tmp_path)
