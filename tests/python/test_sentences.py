"""What wrong use is told, where Python alone can find out: the words say what was given, and what can be."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import sire
import sire.torch_memory_saver
import sire.vllm
from sire import _files, _library, _process, _progress, _safetensors
from sire._tags import encode_tag
from sire.memory import MemoryConfig
from sire.models import _pools
from sire.torch_memory_saver import _saver
from sire.vllm import _allocator

from fake_library import FakeLibrary


def saver() -> _saver.TorchMemorySaver:
    return _saver.torch_memory_saver


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: encode_tag(7), "a tag is a str such as 'model/weights', not "),
    (lambda: encode_tag("a\0b"), "the tag 'a\\x00b' contains a NUL character"),
    (lambda: encode_tag("a\ud800"), "the tag 'a\\ud800' cannot be written as UTF-8"),
    (lambda: encode_tag(""), "a tag is not empty; leave it out to mean everything"),
    (lambda: sire.parse_size(1.5), "a size is an int or a text such as '6GiB', not float"),  # type: ignore[arg-type]
    (lambda: sire.parse_size(-1), "the size -1 is outside 0 ... 2**63 - 1 bytes"),
    (lambda: sire.region("a", backup="ram"), "backup is None, 'cpu', 'disk', 'file' or 'auto', not 'ram'"),  # type: ignore[arg-type]
    (lambda: sire.region("a", backup="cpu", verify="sum"), "verify is None, 'hash' or 'bytes', not 'sum'"),  # type: ignore[arg-type]
    (lambda: sire.region("a", on_paused="wait"), "on_paused is 'refuse' or 'resume', not 'wait'"),  # type: ignore[arg-type]
    (lambda: sire.region("a").__exit__(None, None, None), "region 'a' is left in thread 'MainThread', which did not"),
    (lambda: sire.pause("a", release="soon"), "release is 'now' or 'lazy', not 'soon'"),  # type: ignore[arg-type]
    (lambda: sire.time_slice(group="a\0b"), "group is a name of at most 255 bytes, not 'a\\x00b'"),
    (lambda: sire.time_slice(group="a\ud800"), "the group 'a\\ud800' cannot be written as UTF-8"),
    (lambda: sire.set_disk_directory("a\0b"), "a path does not contain NUL"),
    (lambda: _files._named(7), "file_backup takes a module, or tensors with their names, not int"),
    (lambda: _files._named({"a": 7}), "file_backup takes tensors by name, not int by 'a'"),
    (lambda: sire.learn_order(7), "learn_order takes a torch.nn.Module, not int"),
    (lambda: _progress.order_ranges(7), "order is an Order, a module or tensors, not int"),
    (lambda: _safetensors._parsed(b'{"a": 1, "a": 2}', "file"), "a name occurs twice"),
    (lambda: _safetensors._parsed(b'{"a": %d}' % 10**30, "file"), "the number 10000000000000000000... is too large"),
    (lambda: _pools._bytes("much%", 100), "'much%' is neither a size nor a percentage"),
    (lambda: _pools._bytes("101%", 100), "a percentage is between 0 and 100, not '101%'"),
    (lambda: MemoryConfig(pin_memory="yes"), "pin_memory is True or False, not 'yes'"),  # type: ignore[arg-type]
    (lambda: MemoryConfig(disk_cache_dir=7), "disk_cache_dir is a path or None, not 7"),  # type: ignore[arg-type]
    (
        lambda: MemoryConfig(gpu_offload_threshold=0.9, gpu_emergency_threshold=0.8),
        "gpu_offload_threshold (0.9) must not be above gpu_emergency_threshold (0.8); set both",
    ),
    (lambda: _saver.register_hook_mode("torch", object), "'torch' is a built-in hook mode"),
    (lambda: _saver._backup(True, True, None), "enable_cpu_backup and enable_disk_backup exclude each other"),
    (lambda: _saver._backup(False, True, "mmap"), "cpu_backup_backend needs enable_cpu_backup=True"),
    (lambda: _saver._backup(True, False, "tape"), "cpu_backup_backend is 'mmap' or 'pinned', not 'tape'"),
    (lambda: saver().disable(dispose_mem_pool_after_use=False), "disable() always drops its pool at the end"),
    (lambda: _allocator._tags(7), "tags are a str, or a tuple or list of them, not 7"),
    (lambda: _allocator._path(7), "a tag is a str such as 'weights', not 7"),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_an_argument_that_cannot_be_is_named(library: FakeLibrary, call: Callable[[], object], words: str) -> None:
    with pytest.raises(sire.SireError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["sire", "sire.torch_memory_saver", "sire.vllm"])
def test_a_name_that_a_module_does_not_have_is_named(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute '_nonsense'"):
        sys.modules[name]._nonsense  # noqa: B018


def test_without_a_library_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SIRE_LIBRARY", raising=False)
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_library, "_checkout_candidates", list)
    looked = (
        f"is neither named in SIRE_LIBRARY nor in {re.escape(str(tmp_path))}/_native.* Install the package with pip"
    )
    with pytest.raises(sire.LibraryNotFoundError, match=looked):
        _library.library_path()


def test_a_backend_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMS_INIT_CPU_BACKUP_BACKEND", "tape")
    with pytest.raises(
        sire.InvalidArgumentError, match="TMS_INIT_CPU_BACKUP_BACKEND is 'mmap' or 'pinned', not 'tape'"
    ):
        _saver._is_pageable("cpu", None)


def test_a_margin_is_only_set() -> None:
    with pytest.raises(NotImplementedError, match="memory_margin_bytes can only be set"):
        _ = sire.torch_memory_saver.torch_memory_saver.memory_margin_bytes


def test_a_path_that_cannot_be_preloaded_is_named(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary) -> None:
    monkeypatch.setattr(_library, "library_path", lambda: "/with blank/libsire_alloc.so")
    with pytest.raises(sire.InvalidArgumentError, match="LD_PRELOAD separates its entries by spaces and colons"):
        _process.subprocess_environment(hook_mode="preload")


def test_somebody_elses_package_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = types.ModuleType("memory_management")
    theirs.__file__ = "/elsewhere/memory_management.py"
    monkeypatch.setitem(sys.modules, "memory_management", theirs)
    with pytest.raises(
        sire.UnsupportedError, match=r"call sire.compat.enable\(\) before anything imports it, or uninstall"
    ):
        sire.compat.enable()
