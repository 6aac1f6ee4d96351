"""What wrong use of models, slices and commits is told: the words say what was given, and what can be."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import managed
import pytest
import sire
import torch
from sire import _library, _memory, _packed, _torch
from sire._units import disk as units_disk
from sire._units import wrapping
from sire.memory import MemoryManager
from sire.models import _commits, _estimate, _lora, _setup
from sire.slyce import SlyceModel, _logs
from sire.slyce import _manager as slices
from sire.slyce import _model as slyce
from sire.slyce.models import TransformerStack
from sire.torchtools import gpu_scheduler
from torch import nn


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As `managed.fresh`."""
    yield from managed.fresh()


class Silent(_commits.CommitABC[Any]):
    def apply(self, obj: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Says nothing of how to revert it."""


class Wanting(_commits.CommitWithAutoManage[Any]):
    def apply(self, obj: Any, **kwargs: Any) -> Any:
        return self.am


def one_slice(**options: Any) -> SlyceModel:
    return SlyceModel([{"name": "a", "constructor": nn.Linear, "config": (2, 2)}], gpu_strategy="none", **options)


def lora(up: tuple[int, int], down: tuple[int, int]) -> _lora.LoraCommit:
    return _lora.LoraCommit({"layer.lora_A.weight": torch.ones(down), "layer.lora_B.weight": torch.ones(up)})


LAYER = nn.Sequential()
LAYER.add_module("layer", nn.Linear(4, 4))

WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: sire.models.adopt(7), "adopt takes a torch.nn.Module, not int"),
    (lambda: sire.models.adopt(nn.Linear(2, 2), mode="x"), "mode is one of 'auto', 'view', 'paused', not 'x'"),  # type: ignore[arg-type]
    (lambda: sire.HookCommit(print, kind="x"), "kind is one of "),  # type: ignore[arg-type]
    (
        lambda: _lora.LoraCommit({"a.dora_scale": 1}),
        "'a.dora_scale' belongs to a variant of LoRA that cannot be applied",
    ),
    (lambda: _memory.get_cpu_backup(torch.ones(4, 4, device="cuda").t()), "get_cpu_backup takes a contiguous tensor"),
    (lambda: units_disk.bytes_of(torch.ones(4, 4).t()), "a dense CPU tensor is needed"),
    (lambda: MemoryManager().wrap_module(7), "a torch.nn.Module can be wrapped, not int"),
    (lambda: MemoryManager().wrap_model(LAYER, [7]), "layer_types is a list of module classes such as [nn.Linear]"),
    (lambda: _commits.named_tensors(7), "weights are those of a torch.nn.Module, not of a int"),
    (lambda: _commits.required({"weight": 1}, "bias", LAYER), "has no parameter or buffer 'bias'; it has weight"),
    (lambda: Silent().revert(LAYER), "Silent was not applied to this Sequential"),
    (
        lambda: sire.CommitObjectProxy(nn.Linear(2, 2)).add_commit(Silent()).apply_commit_stack(),
        "Silent.apply returned nothing: return what reverts it, or override",
    ),
    (lambda: sire.CommitObjectProxy(LAYER).add_commit(7), "a commit is a CommitABC, not a int"),  # type: ignore[arg-type]
    (lambda: Wanting().am, "Wanting is applied by an AutoManageCommitObjectProxy only, not by a plain proxy"),
    (
        lambda: sire.AutoManageCommitObjectProxy(nn.Linear(2, 2)).apply_commit_stack(),
        "commits inside 'with proxy:' only",
    ),
    (
        lambda: _estimate.estimated([], LAYER),
        "an inference_memory_estimator is bytes, a callable or a Profiler, not list",
    ),  # type: ignore[arg-type]
    (lambda: _lora.LoraCommit({}, mode="both"), "mode is 'auto', 'merge' or 'side', not 'both'"),  # type: ignore[arg-type]
    (lambda: lora((4, 2), (2, 4)).apply(nn.Linear(4, 4)), "the module has no layer for 'layer'"),
    (lambda: lora((3, 2), (2, 4)).apply(LAYER), "the product of the matrices is [3, 4], the weight is [4, 4]"),
    (lambda: sire.WeightCommit({"layer.weight": torch.ones(2)}).apply(LAYER), "has shape [2], the weight has [4, 4]"),
    (lambda: sire.HookCommit({"other": print}).apply(LAYER), "Sequential has no submodule 'other'"),
    (lambda: sire.manage({1}), "a set cannot be managed: known are "),
    (lambda: sire.auto_manage(), "auto_manage takes an object, or several"),
    (
        lambda: sire.InferenceOptimizerHook(default_offload_policy="tape"),
        "default_offload_policy is 'cpu' or 'disk', not",
    ),  # type: ignore[arg-type]
    (lambda: _setup.setup_default_pools(release="now"), "release is 'eager' or 'lazy', not 'now'"),  # type: ignore[arg-type]
    (lambda: _logs.logger_for(LAYER, None, True, "LOUD"), "log_level is a level of Python's logging such as 'INFO'"),
    (lambda: slices._checked("best", None, None, None), "gpu_strategy is 'none', 'active_only' or 'limit_gpu', not"),
    (lambda: slices._checked("none", None, 7, None), "max_cpu_mem_mb needs disk_cache_path: what leaves host memory"),
    (lambda: slyce._by_slice(7), "a state is a path or a table, not int"),
    (lambda: slyce._by_slice({"a.b": 1}), "'a.b' is no key of a SlyceModel's state, which are slices.NAME.KEY"),
    (lambda: SlyceModel([], gpu_strategy="none"), "a SlyceModel needs at least one slice"),
    (
        lambda: SlyceModel([{"label": 1}], gpu_strategy="none"),
        "described by name, constructor and config, not by label",
    ),
    (lambda: one_slice().erase_slice("a"), "slice 'a' is the only one; a SlyceModel needs at least one"),
    (lambda: one_slice().manager.register("a.b", nn.Linear), "a slice's name is a text without dots, not 'a.b'"),
    (lambda: one_slice().manager.register("b", 7), "the constructor of slice 'b' is a class or function, not 7"),  # type: ignore[arg-type]
    (lambda: slices.Slice("b", dict).construct(), "the constructor of slice 'b' gave a dict, not a torch.nn.Module"),
    (lambda: TransformerStack(0, 8, 2), "layers and layers_per_slice are 1 or more"),
    (
        lambda: one_slice().manager.offload_slice("a"),
        "slice 'a' cannot go further: give disk_cache_path for a disk tier",
    ),
    (lambda: wrapping.unit_of(nn.Linear(2, 2)), "this module is not managed any more; wrap it again"),
    (
        lambda: gpu_scheduler.ProbeFunction(model_ctor="model")._model(),
        "'model' names no model; write 'module:attribute'",
    ),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_an_argument_that_cannot_be_is_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(sire.SireError) as caught:
        call()
    assert words in str(caught.value)


def test_a_module_is_adopted_once_and_until_it_is_released(tag: str) -> None:
    module = nn.Linear(8, 8)
    adopted = sire.models.adopt(module, tag=tag)
    with pytest.raises(sire.InvalidArgumentError, match="this Linear is adopted already, with the tag"):
        sire.models.adopt(module)
    adopted.release()
    with pytest.raises(sire.InvalidArgumentError, match="it was released; adopt the module again"):
        adopted.load()


def test_a_hook_is_attached_once(tmp_path: Path) -> None:
    module, hook = nn.Sequential(nn.Linear(8, 8)), sire.InferenceOptimizerHook(cache_dir=tmp_path)
    hook.attach(module)
    try:
        with pytest.raises(sire.InvalidArgumentError, match=r"is attached already; detach\(\) it, or make another one"):
            hook.attach(nn.Linear(2, 2))
    finally:
        hook.detach()


def test_a_managed_module_says_what_cannot_be_changed() -> None:
    module = nn.Linear(8, 8)
    sire.manage(module)
    with pytest.raises(sire.InvalidArgumentError, match="is managed already: mode cannot be changed any more"):
        sire.manage(module, mode="view")


def test_a_unit_that_is_needed_stays() -> None:
    with MemoryManager() as manager:
        unit = wrapping.unit_of(manager.wrap_module(nn.Linear(8, 8))).unit
        unit.pinned = True
        with pytest.raises(sire.BusyError, match=r"cannot be sent away now: it is pinned. Repeat the call afterwards"):
            unit.refuse_use("sent away")


def test_what_is_only_paused_has_no_copy(tag: str) -> None:
    module = nn.Linear(8, 8)
    adopted = sire.models.adopt(module, tag=tag, mode="paused")
    adopted.load()
    with pytest.raises(sire.InvalidArgumentError, match="in paused mode have no copy to restore from"):
        adopted.restore(module.weight)
    adopted.release()


def test_a_check_says_who_checks(tag: str) -> None:
    with sire.region(tag):
        tensor = torch.ones(8, device="cuda")
    advice = r"sire.resume\(tag\). Checked because of SIRE_CHECK=1 or sire.checked\(\)"
    with sire.checked(), sire.paused(tag), pytest.raises(sire.PausedError, match=advice):
        tensor.add(1)


def test_only_streams_and_events_are_waited_for(tag: str) -> None:
    with sire.region(tag):
        torch.ones(8, device="cuda")
    sire.pause(tag)
    progress = sire.resume(tag, non_blocking=True)
    with pytest.raises(sire.InvalidArgumentError, match="wait_stream takes a CUDA stream or event, not int"):
        progress.wait_stream(7)
    progress.wait()


def test_memory_of_somebody_elses_is_found(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = _library.load()
    monkeypatch.setattr(type(library), "owns", lambda *_: False)
    found = "were allocated at 0x.* without Sire: pausing would release nothing"
    with pytest.raises(sire.InactiveError, match=found), sire.region(tag):
        torch.ones(8, device="cuda")


def test_a_pytorch_without_such_pools_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("MemPool does not go with expandable_segments.")

    monkeypatch.setattr(torch.cuda, "MemPool", refuses)
    with pytest.raises(sire.UnsupportedError, match=r"makes no pool for a region: MemPool does not go with .* Preload"):
        _torch.new_pool(torch, 0)


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(sire.OutOfBackupSpaceError, match=r"7 bytes for .* cannot be had in the disk \("):
        _packed._on_disk(7)
    store = units_disk.DiskStore(tmp_path)
    monkeypatch.setattr(store, "_write", full)
    says = r"cannot write .*: No space left on device; the tensors stay in host memory\. Free space, or name another"
    with pytest.raises(sire.OutOfBackupSpaceError, match=says):
        store.write([torch.zeros(4)])
    assert store.used == 0


def test_a_probe_that_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with pytest.raises(
        sire.ProbeTimeoutError, match=r"the probe was not done after 0.01 s, and was ended; give it more"
    ):
        gpu_scheduler._answer(None, ours, 0.01, again=False)
    theirs.send(("failed", "boom"))
    with pytest.raises(sire.ProbeError, match="the probe failed:\nboom"):
        gpu_scheduler._answer(None, ours, 1, again=False)

    def taken(*_: object) -> None:
        raise sire.ReservationTimeoutError("somebody has it")

    monkeypatch.setattr(gpu_scheduler, "take_lock", taken)
    with pytest.raises(
        sire.ProbeTimeoutError, match=r"the probe did not have its turn within .* its time-out: somebody"
    ):
        gpu_scheduler._turn("name", 1.0)
