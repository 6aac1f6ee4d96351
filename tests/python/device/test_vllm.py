"""vLLM's sleep mode on Sire: the plugin, and the contract of its allocator, in a stand-in with vLLM's interface."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sire
import sire.vllm
import torch
from measure import MIB, device_used, on_software_device, region_bytes
from sire import _torch
from sire.vllm import SireAllocator, _allocator, _segments

STAND_IN = Path(__file__).with_name("stand_in_for_vllm")
WEIGHTS, KV = 48 * MIB, 64 * MIB


def forget_vllm() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "vllm" or name == "sire.vllm._backend":
            del sys.modules[name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The stand-in is what `import vllm` finds; Sire has not met it."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM itself is installed here")
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setattr(SireAllocator, "instance", None)
    monkeypatch.delenv("SIRE_VLLM", raising=False)
    yield monkeypatch
    if torch.cuda.is_initialized():
        sire.resume()
    forget_vllm()


class Model(torch.nn.Module):
    """Layers of 4 MiB, and a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        layer = (1024, 1024)
        self.layers = torch.nn.ParameterList(torch.randn(layer, device="cuda") for _ in range(WEIGHTS // (4 * MIB)))
        self.register_buffer("rope", torch.arange(100_000, dtype=torch.float32, device="cuda"), persistent=False)


def kv_cache() -> torch.Tensor:
    return torch.full((KV,), 7, dtype=torch.uint8, device="cuda")


@pytest.fixture(params=["sire", "cumem"])
def worker(request: pytest.FixtureRequest, stand_in: pytest.MonkeyPatch) -> Iterator[Any]:
    """A worker with model and KV cache: with the backend of ours, and with vLLM's default over our allocator."""
    stand_in.setenv("SIRE_VLLM", "1")
    sire.vllm.register()
    made = importlib.import_module("vllm.worker").Worker(request.param)
    made.load_model(Model)
    made.initialize_kv_cache(kv_cache)
    yield made
    sire.resume("vllm")
    made.model = made.kv_cache = None
    gc.collect()


def weights_of(worker: Any) -> list[torch.Tensor]:
    return [each.detach().cpu() for each in worker.model.layers]


def is_lost(kv: torch.Tensor) -> bool:
    # The software device fills memory that it hands out; a GPU may hand the same bytes back.
    return not on_software_device() or not bool((kv == 7).all())


def allocator() -> SireAllocator:
    return SireAllocator.get_instance()


# --- the contract -------------------------------------------------------------------------------------------


def test_level_1_keeps_the_weights_and_throws_the_cache_away(worker: Any) -> None:
    weights, addresses = weights_of(worker), [each.data_ptr() for each in worker.model.layers]
    before = device_used()
    worker.sleep(1)
    assert before - device_used() >= WEIGHTS + KV
    [host] = [each for each in sire.stats()["tiers"] if each["tier"] == "host"]
    assert WEIGHTS <= host["used_bytes"] < WEIGHTS + 4 * MIB
    worker.wake_up()
    assert device_used() <= before
    assert [each.data_ptr() for each in worker.model.layers] == addresses
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))
    assert int(worker.model.rope[-1]) == 99_999
    assert is_lost(worker.kv_cache)


def test_level_2_keeps_the_buffers_alone(worker: Any) -> None:
    weights = weights_of(worker)
    before = device_used()
    worker.sleep(2)
    assert before - device_used() >= WEIGHTS + KV
    [host] = [each for each in sire.stats()["tiers"] if each["tier"] == "host"]
    assert host["used_bytes"] < 4 * MIB
    worker.wake_up()
    assert int(worker.model.rope.sum(dtype=torch.float64)) == 99_999 * 50_000
    for layer, value in zip(worker.model.layers, weights, strict=True):
        layer.data.copy_(value)
    worker.sleep(1)
    worker.wake_up()
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))


def test_tags_wake_one_by_one(worker: Any) -> None:
    weights, before = weights_of(worker), device_used()
    worker.sleep(1)
    asleep = device_used()
    worker.wake_up(["weights"])
    assert WEIGHTS <= device_used() - asleep < WEIGHTS + 16 * MIB
    assert allocator().asleep
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))
    worker.wake_up(["kv_cache"])
    assert device_used() <= before
    assert not allocator().asleep
    worker.kv_cache.fill_(1)


def test_a_second_sleep_and_a_second_waking_change_nothing(worker: Any) -> None:
    weights = weights_of(worker)
    worker.sleep(1)
    asleep = device_used()
    worker.sleep(1)
    allocator().sleep(())  # what sleeps with a backup keeps it
    assert device_used() == asleep
    worker.wake_up()
    worker.kv_cache.fill_(9)
    worker.wake_up()
    worker.wake_up(["weights", "kv_cache", "of nobody"])
    assert bool((worker.kv_cache == 9).all())
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))


def test_a_sleep_after_a_partial_waking_puts_the_rest_away(worker: Any) -> None:
    weights = weights_of(worker)
    worker.sleep(1)
    asleep = device_used()
    worker.wake_up(["weights"])
    worker.sleep(1)
    assert device_used() == asleep
    worker.wake_up()
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))


@pytest.mark.skipif(not on_software_device(), reason="fills the device")
def test_waking_without_room_is_a_typed_error_and_can_be_repeated(worker: Any) -> None:
    weights = weights_of(worker)
    worker.sleep(1)
    free, _ = torch.cuda.mem_get_info()
    with sire.disable():
        thief = torch.empty(free - 32 * MIB, dtype=torch.uint8, device="cuda")
    asleep = torch.cuda.mem_get_info()[0]
    for tags in (None, ["weights"], ["kv_cache"]):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            worker.wake_up(tags)
        assert isinstance(caught.value, sire.OutOfMemoryError)
        assert torch.cuda.mem_get_info()[0] == asleep
    assert allocator().asleep
    del thief
    gc.collect()
    torch.cuda.empty_cache()
    worker.wake_up()
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))


@pytest.mark.skipif(not on_software_device(), reason="fills the device")
def test_of_several_tags_those_before_the_failure_are_awake(worker: Any) -> None:
    weights = weights_of(worker)
    worker.sleep(1)
    free, _ = torch.cuda.mem_get_info()
    with sire.disable():
        thief = torch.empty(free - WEIGHTS - 40 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(sire.OutOfMemoryError):
        worker.wake_up(["weights", "kv_cache"])
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))
    assert allocator().asleep
    del thief
    torch.cuda.empty_cache()
    worker.wake_up(["weights", "kv_cache"])
    assert not allocator().asleep
    worker.kv_cache.fill_(1)


def test_a_thread_that_allocates_stops_the_sleep_of_every_tag(worker: Any) -> None:
    weights, before = weights_of(worker), device_used()
    with allocator().use_memory_pool("weights"), pytest.raises(sire.BusyError, match="vllm/weights"):
        worker.sleep(1)
    assert device_used() <= before
    assert not allocator().asleep
    assert bool((worker.kv_cache == 7).all())
    worker.sleep(1)
    with pytest.raises(sire.PausedError, match="vllm/weights"), allocator().use_memory_pool("weights"):
        pytest.fail("entered")
    worker.wake_up()
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))


def test_what_is_kept_survives_level_2(worker: Any) -> None:
    weights = weights_of(worker)
    allocator().keep(worker.model, worker.model.layers[3])
    before = device_used()
    report = allocator().sleep(())
    assert report is not None
    assert 4 * MIB <= report.bytes_copied < 8 * MIB
    assert before - device_used() >= WEIGHTS + KV
    allocator().wake_up()
    assert int(worker.model.rope.sum(dtype=torch.float64)) == 99_999 * 50_000
    assert torch.equal(worker.model.layers[3].detach().cpu(), weights[3])
    with pytest.raises(sire.InvalidArgumentError, match="tensors and modules"):
        allocator().keep("weights")


def test_a_tag_is_discarded_while_the_others_stay_awake(worker: Any) -> None:
    weights, before = weights_of(worker), device_used()
    allocator().discard(("kv_cache",))
    assert before - device_used() >= KV
    assert all(torch.equal(now, then) for now, then in zip(weights_of(worker), weights, strict=True))
    allocator().discard("of nobody")
    worker.wake_up()
    assert is_lost(worker.kv_cache)


def test_what_lies_under_a_tag_is_kept_with_it(worker: Any) -> None:
    """It was thrown away, although waking and discarding a tag mean all that lies under it."""
    with allocator().use_memory_pool("weights/lora"):
        lora = torch.full((4 * MIB,), 5, dtype=torch.uint8, device="cuda")
    worker.sleep(1)
    worker.wake_up()
    assert bool((lora == 5).all())
    assert is_lost(worker.kv_cache)


def test_regions_of_the_program_stay_awake(worker: Any, tag: str) -> None:
    with sire.region(tag):
        mine = torch.full((8 * MIB,), 3, dtype=torch.uint8, device="cuda")
    worker.sleep(2)
    assert bool((mine == 3).all())
    worker.wake_up()


def test_usage_is_nothing_once_the_tensors_are_gone(worker: Any) -> None:
    assert WEIGHTS + KV <= allocator().get_current_usage() < WEIGHTS + KV + 64 * MIB
    worker.sleep(1)
    assert allocator().get_current_usage() >= WEIGHTS + KV
    worker.wake_up()
    worker.model = worker.kv_cache = None
    gc.collect()
    assert allocator().get_current_usage() == 0
    worker.load_model(Model)  # vLLM refuses a second model while the first holds memory


def test_memory_that_loading_used_for_a_while_goes_back(worker: Any) -> None:
    before = device_used()
    with allocator().use_memory_pool("weights"):
        wide = torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
        narrow = wide[: 2 * MIB].clone()
        del wide
    assert device_used() - before < 64 * MIB
    assert narrow.numel() == 2 * MIB


@pytest.mark.parametrize("wrong", [7, b"weights", ("weights", 3), {"weights": 1}])
def test_malformed_tags_are_refused(worker: Any, wrong: Any) -> None:
    calls: list[Callable[[Any], Any]] = [allocator().sleep, allocator().discard, allocator().wake_up]
    for call in calls:
        with pytest.raises(sire.InvalidArgumentError, match="tags are"):
            call(wrong)
    assert not allocator().asleep


# --- several threads ------------------------------------------------------------------------------------------


def hold_at_once() -> None:
    """Two threads have memory of a tag at the same time, in a pool each; nothing of it lives any more then."""
    both = threading.Barrier(2, timeout=60)

    def hold() -> None:
        with sire.region("vllm/weights", backup="cpu"):
            held = torch.ones(4 * MIB, dtype=torch.uint8, device="cuda")
            both.wait()
            del held

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_pools_that_another_thread_drops_meanwhile_are_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that left a tag at once, or asked for its usage: one of them raised AttributeError."""
    ours = SireAllocator()
    before = ours.get_current_usage()
    hold_at_once()
    assert region_bytes("vllm/weights")["resident_bytes"] > 0
    plain, asked = _torch.segments, list[tuple[int, int]]()

    def segments(torch_: Any, identity: tuple[int, int]) -> list[dict[str, Any]]:
        found = plain(torch_, identity)
        asked.append(identity)
        if len(asked) == 1:
            # What the other thread does, which is faster.
            _segments.return_free(_allocator._is_ours)
        return found

    monkeypatch.setattr(_torch, "segments", segments)
    assert ours.get_current_usage() == before


def test_what_is_kept_while_another_thread_sleeps_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose list was written anew at that moment, it was forgotten."""
    ours = SireAllocator()
    first, second = (torch.ones(4, device="cuda") for _ in range(2))
    ours.keep(first)
    keeper = threading.Thread(target=lambda: ours.keep(second))

    def ref(owner: torch.Tensor) -> Any:
        if owner is first and keeper.ident is None:
            keeper.start()
            # It may have to wait for this thread.
            keeper.join(0.5)
        return weakref.ref(owner)

    monkeypatch.setattr(_allocator, "weakref", SimpleNamespace(ref=ref))
    assert len(ours._spans()) == 1
    keeper.join()
    assert {address for address, _ in ours._spans()} == {first.data_ptr(), second.data_ptr()}


# --- the backend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["sire"], indirect=True)
def test_the_state_tells_the_truth(worker: Any) -> None:
    worker.sleep(1)
    backend = worker._backend
    assert isinstance(backend, sire.vllm.SireBackend)
    assert backend.state() == "SUSPENDED"
    worker.wake_up(["weights"])
    assert backend.state() == "SUSPENDED"
    worker.wake_up(["kv_cache"])
    assert backend.state() == "RUNNING"
    backend.discard(("kv_cache",))
    assert backend.state() == "SUSPENDED"
    worker.wake_up()
    with pytest.raises(sire.InvalidArgumentError, match="1 or 2"):
        worker.sleep(3)
    assert backend.state() == "RUNNING"
    assert type(backend).preserves_communicators()


# --- the plugin -----------------------------------------------------------------------------------------------


def test_without_the_variable_vllm_keeps_its_allocator(stand_in: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("vllm.device_allocator")
    original = package.get_mem_allocator_instance
    sire.vllm.register()
    sire.vllm.register()
    assert package.get_mem_allocator_instance is original
    worker = importlib.import_module("vllm.worker").Worker("sire")
    with pytest.raises(sire.UnsupportedError, match="SIRE_VLLM=1"):
        worker.sleep()


def test_a_worker_that_was_imported_before_gets_the_allocator_too(stand_in: pytest.MonkeyPatch) -> None:
    worker = importlib.import_module("vllm.worker")
    stand_in.setenv("SIRE_VLLM", "1")
    sire.vllm.register()
    sire.vllm.register()
    assert worker.get_mem_allocator_instance() is SireAllocator.get_instance()


def test_a_vllm_without_backends_is_served_through_its_class(stand_in: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("vllm.device_allocator")
    stand_in.delattr(package, "get_mem_allocator_instance")
    stand_in.setitem(sys.modules, "vllm.device_allocator.sleep_mode_backend", None)
    stand_in.setenv("SIRE_VLLM", "1")
    sire.vllm.register()
    cumem = importlib.import_module("vllm.device_allocator.cumem")
    assert cumem.CuMemAllocator.get_instance() is SireAllocator.get_instance()


def test_a_vllm_without_a_place_for_it_is_refused(stand_in: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("vllm.device_allocator")
    stand_in.delattr(package, "get_mem_allocator_instance")
    stand_in.setitem(sys.modules, "vllm.device_allocator.cumem", None)
    sire.vllm.register()
    stand_in.setenv("SIRE_VLLM", "1")
    with pytest.raises(
        sire.UnsupportedError, match=r"this vLLM has neither vllm.device_allocator.get_mem_allocator_instance"
    ):
        sire.vllm.register()
    stand_in.setenv("SIRE_VLLM", "yes")
    with pytest.raises(sire.InvalidArgumentError, match="SIRE_VLLM is 1"):
        sire.vllm.register()


def test_a_stranger_of_the_same_name_is_refused(stand_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    module = importlib.import_module("vllm.device_allocator.sleep_mode_backend")
    module.SleepModeBackendFactory.register_backend("sire", module.__name__, "CuMemBackend")
    sire.vllm.register()  # nobody asked for it: vLLM goes on
    assert "another plugin" in caplog.text
    stand_in.setenv("SIRE_VLLM", "1")
    with pytest.raises(sire.UnsupportedError, match="another plugin has given vLLM a sleep-mode backend named 'sire'"):
        sire.vllm.register()


def test_a_vllm_that_cannot_be_imported_is_named(stand_in: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "device_allocator"
    package.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    (package / "__init__.py").write_text("import a_part_of_vllm_that_is_missing")
    stand_in.syspath_prepend(str(tmp_path))
    stand_in.setenv("SIRE_VLLM", "1")
    with pytest.raises(sire.UnsupportedError, match="a_part_of_vllm_that_is_missing"):
        sire.vllm.register()


def test_without_vllm_the_error_says_what_is_missing() -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM itself is installed here")
    for call in (sire.vllm.register, lambda: sire.vllm.SireBackend):
        with pytest.raises(sire.UnsupportedError, match="vLLM, which is not installed"):
            call()
    code = "import sire.vllm, sys; print({'vllm', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "set()"


def test_the_entry_point_is_the_plugin() -> None:
    project = Path(sire.__file__).parents[2] / "pyproject.toml"
    if not project.exists():
        pytest.skip("an installed package")
    text = project.read_text()
    [line] = [each for each in text.partition('"vllm.general_plugins"]')[2].splitlines() if each][:1]
    name, _, target = line.partition(" = ")
    module, _, function = target.strip('"').partition(":")
    assert name == "sire"
    assert getattr(importlib.import_module(module), function) is sire.vllm.register


# --- subtraction of ranges, against a map of bytes ---------------------------------------------------------------


def test_subtraction_of_ranges_equals_a_map_of_bytes() -> None:
    dice = random.Random(5)  # noqa: S311

    def some() -> list[tuple[int, int]]:
        return [(dice.randrange(60), dice.randrange(1, 20)) for _ in range(dice.randrange(5))]

    for _ in range(500):
        ranges, kept = some(), some()
        wanted = {at for start, size in ranges for at in range(start, start + size)}
        wanted -= {at for start, size in kept for at in range(start, start + size)}
        found = _segments.without(ranges, kept)
        assert {at for start, size in found for at in range(start, start + size)} == wanted
        assert all(size > 0 for _, size in found)
