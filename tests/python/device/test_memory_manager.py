"""`sire.memory` on a device that is half as large as the model: right outputs, right losses, and never too much memory.

The device has 64 MiB (test_device_modes.py says so); what a layer does on it is done by the same code as on the CPU,
so that results must be equal to the bit.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sire
import torch
from running import until
from sire._units.adopted import Movers
from sire.memory import MemoryConfig, MemoryManager, ModuleWrapper, auto_manage_model
from torch import nn

WIDTH = 1024
LAYERS = 32
CUDA = torch.device("cuda", 0)


def stack(layers: int = LAYERS, width: int = WIDTH) -> nn.Sequential:
    """4 MiB of weights for each layer."""
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())])


def device_bytes() -> int:
    return torch.cuda.mem_get_info()[1]


def weight_bytes(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters())


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leaves nothing on the device. What managers paused must not be resumed all at once: it would not fit."""
    yield
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the bit on the software device; a GPU sums in another order."""
    exact = "software" in torch.cuda.get_device_name()
    return torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.fixture
def oversized() -> nn.Sequential:
    model = stack()
    if weight_bytes(model) < 2 * device_bytes():
        pytest.skip("the device is not small enough for this test")
    return model


@pytest.mark.parametrize("engine", ["sire", "pytorch"])
def test_a_model_twice_the_device_runs_forward(
    oversized: nn.Sequential, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "pytorch":
        monkeypatch.setattr(Movers, "_served", lambda self: False)
    x = torch.randn(8, WIDTH)
    with torch.no_grad():
        expected = oversized(x)
        parameters, keys = list(oversized.parameters()), list(oversized.state_dict())
        manager = auto_manage_model(oversized)
        assert oversized.to("cuda") is oversized
        for _ in range(3):
            assert same(oversized(x.cuda()).cpu(), expected)
    assert all(one is other for one, other in zip(parameters, oversized.parameters(), strict=True))
    assert list(oversized.state_dict()) == keys
    summary = manager.get_memory_summary()
    assert summary["system"]["engine"] == engine
    assert summary["system"]["managed_modules"] == LAYERS
    assert summary["system"]["total_offloads"] > LAYERS
    assert summary["gpu"]["total_bytes"] == device_bytes()
    manager.cleanup()
    assert not any(isinstance(each, ModuleWrapper) for each in oversized.modules())
    with torch.no_grad():
        assert same(oversized(x), expected), "cleanup leaves the whole model on the CPU, where it has room"


def test_above_the_reload_threshold_a_layer_comes_early_in_the_place_of_one_that_is_needed_later(
    oversized: nn.Sequential,
) -> None:
    x = torch.randn(8, WIDTH)
    there: list[int] = []
    with torch.no_grad(), MemoryManager(MemoryConfig(gpu_reload_threshold=0.2)) as manager:
        manager.set_auto_management(False)  # only who comes makes others leave

        def settled(*_: object) -> None:
            manager.residency.settle()
            there.append(sum(unit.tier == "gpu" for unit in manager.residency.listed()))

        manager.wrap_model(oversized)
        oversized.to("cuda")
        for _ in range(2):
            oversized(x.cuda())
        manager.residency.settle()
        for layer in oversized:
            if isinstance(layer, ModuleWrapper):
                layer.register_forward_hook(settled)
        before = dict(manager.residency.counts)
        for _ in range(2):
            oversized(x.cuda())
        came = {what: count - before[what] for what, count in manager.residency.counts.items()}
    assert len(set(there)) == 1, "as many leave as come"
    assert there[0] * 4 * 2**20 > 0.4 * device_bytes(), "what was there stays, beside the threshold"
    # One is in use and two are on their way; of the others as many stay as there is room for.
    fewest = 2 * LAYERS * (LAYERS - there[0]) / (LAYERS - 3)
    assert came["prefetches"] > LAYERS
    assert came["loads"] <= fewest + 2


def test_sending_an_oversized_model_to_the_device_takes_no_room(oversized: nn.Sequential) -> None:
    with MemoryManager() as manager:
        manager.wrap_model(oversized)
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        oversized.to("cuda")
        assert before - torch.cuda.mem_get_info()[0] <= 4 << 20, "biases only"
        assert oversized[0].bias.device == CUDA
        assert oversized[0].weight.device.type == "cpu"
        assert oversized[0].weight.shape == (WIDTH, WIDTH)


def trained(model: nn.Module, device: str, steps: int = 2) -> list[float]:
    """Losses of some steps."""
    torch.manual_seed(1)
    x, y = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    chosen = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        chosen.zero_grad()
        loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
        loss.backward()
        chosen.step()
        losses.append(loss.item())
    return losses


def test_a_model_twice_the_device_trains(oversized: nn.Sequential) -> None:
    twin = copy.deepcopy(oversized)
    manager = auto_manage_model(oversized)
    oversized.to("cuda")
    losses = trained(oversized, "cuda")
    manager.cleanup()
    assert losses == trained(twin, "cpu")
    for name, value in twin.state_dict().items():
        assert same(oversized.state_dict()[name].cpu(), value), name


def test_gradients_accumulate_over_backward_passes() -> None:
    model, twin = stack(4), stack(4)
    x = torch.randn(4, WIDTH)
    config = MemoryConfig(aggressive_post_forward_offload=True, prefetch_enabled=False)
    with MemoryManager(config) as manager:
        manager.wrap_model(model)
        model.to("cuda")
        for _ in range(2):
            model(x.cuda()).sum().backward()
            twin(x).sum().backward()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert mine.grad is not None
            assert mine.grad.device == mine.device
            assert same(mine.grad.cpu(), other.grad)
        assert all(layer.weight.device.type == "cpu" for layer in model if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_an_optimizer_may_step_inside_the_backward_pass(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit of a step that has no room on the device leaves it, although the pass that steps has just used it."""
    model, twin = stack(3), stack(3)
    config = MemoryConfig(offload_1d_parameters=True, prefetch_enabled=False)
    parameters = [*model.parameters(), *twin.parameters()]
    on_the_cpu = set(twin.parameters())
    optimizers = {each: torch.optim.SGD([each], lr=0.1, momentum=0.9) for each in parameters}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None
        assert parameter.is_cuda == (room > 0 and parameter not in on_the_cpu)

    with MemoryManager(config) as manager:
        monkeypatch.setattr(manager.residency, "spare", lambda _device: room)
        manager.wrap_model(model)
        model.to("cuda")
        handles = [each.register_post_accumulate_grad_hook(step) for each in parameters]
        for _ in range(2):
            x = torch.randn(4, WIDTH)
            model(x.cuda()).sum().backward()
            twin(x).sum().backward()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert same(mine.cpu(), other)
        for each in handles:
            each.remove()


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_has_all_of_its_state_where_it_steps(
    fused: bool, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a fused optimizer counts steps by stayed on the device when there was room for nothing else."""
    model, twin, room = stack(1), stack(1), 1 << 30
    mine, other = (torch.optim.AdamW(each.parameters(), lr=0.1, fused=fused) for each in (model, twin))
    with MemoryManager(MemoryConfig(offload_1d_parameters=True, prefetch_enabled=False)) as manager:
        monkeypatch.setattr(manager.residency, "spare", lambda _device: room)
        manager.wrap_model(model)
        model.to("cuda")
        (unit,) = manager.residency.listed()
        for room, unit.pinned in ((1 << 30, False), (0, False), (0, pinned)):
            x = torch.randn(4, WIDTH)
            model(x.cuda()).sum().backward()
            twin(x).sum().backward()
            mine.step()
            other.step()
            assert model[0].weight.is_cuda is (room > 0 or unit.pinned)
            assert {each.device for each in mine.state[model[0].weight].values() if each.dim()} == {unit.here}
        for one, expected in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(one.cpu(), expected, atol=1e-4)


def test_what_a_backward_pass_uses_is_not_offloaded() -> None:
    """`offload_all` paused a layer's pages while the backward pass's kernels were reading them; now it is refused."""
    model = stack(2)
    with MemoryManager(MemoryConfig(prefetch_enabled=False)) as manager:
        manager.wrap_model(model)
        model.to("cuda")

        def in_the_middle(_: torch.Tensor) -> None:
            for leave in (model[0].offload_all, model[0].cpu):
                with pytest.raises(sire.BusyError, match="cannot be offloaded now: a backward pass uses it"):
                    leave()
            assert model[0].weight.is_cuda

        model[0].weight.register_hook(in_the_middle)
        model(torch.randn(2, WIDTH, device="cuda")).sum().backward()
        assert not manager.residency._backward
        model[0].offload_all()
        assert not model[0].weight.is_cuda


def test_manual_control_moves_a_layer_both_ways() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    expected = layer.weight.detach().clone()
    with MemoryManager() as manager:
        wrapped = manager.wrap_module(layer, module_id="my_layer")
        assert wrapped is layer
        wrapped.load_all()
        assert wrapped.weight.device == CUDA
        assert wrapped.bias.device == CUDA
        assert same(wrapped.weight.cpu(), expected)
        wrapped.offload_all()
        assert wrapped.weight.device.type == "cpu"
        assert same(wrapped.weight, expected)
        info = manager.get_memory_summary()["modules"]["my_layer"]
        assert info["offloaded_parameters"] == WIDTH * WIDTH
        assert info["loaded_parameters"] == WIDTH, "the bias stays"


def test_offload_1d_parameters_takes_biases_too() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    with MemoryManager(MemoryConfig(offload_1d_parameters=True)) as manager:
        manager.wrap_module(layer)
        layer.to("cuda")
        assert layer.bias.device.type == "cpu"
        layer(torch.ones(1, WIDTH, device="cuda"))
        assert layer.bias.device == CUDA


def test_weights_written_while_they_are_away_are_the_weights_that_come_back() -> None:
    model = stack(2)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    with MemoryManager() as manager, torch.no_grad():
        manager.wrap_model(model)
        model.to("cuda")
        model(torch.ones(1, WIDTH, device="cuda"))
        manager.offload_all_modules()
        model.load_state_dict(state)
        model(torch.ones(1, WIDTH, device="cuda"))
        assert model[0].weight.device == CUDA
        for name, value in model.state_dict().items():
            assert same(value.cpu(), state[name])


@pytest.mark.parametrize("engine", ["sire", "pytorch"])
@pytest.mark.parametrize("how", ["hung in", "pointed"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_tensor_that_is_put_into_a_layer_on_the_device_comes_there(
    name: str, how: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer was taken to be where its first tensor is."""
    if engine == "pytorch":
        monkeypatch.setattr(Movers, "_served", lambda self: False)
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(2, WIDTH)
    with MemoryManager(MemoryConfig(offload_1d_parameters=True)) as manager, torch.no_grad():
        manager.wrap_module(layer)
        (unit,) = manager.residency.listed()
        for device in ("cuda", "cpu"):
            layer.to(device)
            layer(x.to(device))
            before = getattr(layer, name)
            fresh = torch.full(before.shape, 0.5, device="cpu" if device == "cuda" else "cuda")
            if how == "hung in":
                setattr(layer, name, nn.Parameter(fresh))
            else:
                before.data = fresh
            layer.to(device)
            found = layer(x.to(device))
            assert {each.device.type for each in unit.tensors} == {device}
            assert same(found.cpu(), nn.functional.linear(x, layer.weight.cpu(), layer.bias.cpu()))
            assert bool((getattr(layer, name) == 0.5).all())
            layer.offload_all()
            assert unit.tier == "cpu"


def test_half_converts_without_a_spike(oversized: nn.Sequential) -> None:
    expected = copy.deepcopy(oversized).to(torch.bfloat16)
    with MemoryManager() as manager:
        manager.wrap_model(oversized)
        oversized.to("cuda", torch.bfloat16)
        x = torch.ones(1, WIDTH, dtype=torch.bfloat16)
        with torch.no_grad():
            assert same(oversized(x.cuda()).cpu(), expected(x))
        assert oversized[0].weight.dtype == torch.bfloat16


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
    model[1].weight = model[0].weight
    x = torch.ones(2, WIDTH)
    expected = model(x)
    with MemoryManager(MemoryConfig(aggressive_post_forward_offload=True)) as manager:
        manager.wrap_model(model)
        model.to("cuda")
        assert same(model(x.cuda()).cpu(), expected)
        assert model[1].weight is model[0].weight
        model(x.cuda()).sum().backward()
        assert model[0].weight.grad is not None


def test_a_transformer_layer_is_one_unit_and_keeps_its_fast_path() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(x)
        with MemoryManager(MemoryConfig(aggressive_post_forward_offload=True)) as manager:
            manager.wrap_model(model)
            model.to("cuda")
            assert isinstance(model.layers[0], ModuleWrapper)
            assert torch.allclose(model(x.cuda()).cpu(), expected, atol=1e-5)


def test_sixteen_threads_share_a_device_for_half_of_the_layers(oversized: nn.Sequential) -> None:
    x = torch.randn(16, 1, WIDTH)
    with torch.no_grad():
        expected = [layer(x[i]) for i, layer in enumerate(list(oversized)[::2][:16])]
    wrong: list[object] = []
    with MemoryManager(MemoryConfig(memory_check_interval=0.01)) as manager:
        manager.wrap_model(oversized)
        oversized.to("cuda")
        layers = list(oversized)[::2][:16]

        def work(number: int) -> None:
            try:
                for step in range(6):
                    at = (number + step) % 16
                    with torch.no_grad():
                        if not same(layers[at](x[at].cuda()).cpu(), expected[at]):
                            wrong.append((number, step))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        assert all(each.leases == 0 for each in manager.residency.listed())


def test_an_exception_inside_forward_leaves_nothing_leased(oversized: nn.Sequential) -> None:
    with MemoryManager() as manager:
        manager.wrap_model(oversized)
        oversized.to("cuda")
        with pytest.raises(RuntimeError):
            oversized(torch.ones(1, WIDTH + 1, device="cuda"))
        assert all(each.leases == 0 for each in manager.residency.listed())
        with torch.no_grad():
            oversized(torch.ones(1, WIDTH, device="cuda"))


def test_a_layer_larger_than_the_device_is_a_clear_error() -> None:
    layer = nn.Linear(8192, 4096)
    if device_bytes() > weight_bytes(layer):
        pytest.skip("the device is not small enough for this test")
    with MemoryManager() as manager:
        manager.wrap_module(layer, "huge")
        layer.to("cuda")
        with pytest.raises(sire.OutOfMemoryError, match="no room for 'huge'"):
            layer(torch.ones(1, 8192, device="cuda"))
        assert layer.weight.device.type == "cpu"
        layer.to("cpu")
        layer(torch.ones(1, 8192))


def test_the_disk_gives_back_what_it_was_given() -> None:
    oversized, x = stack(12), torch.randn(2, WIDTH)
    with torch.no_grad():
        expected = oversized(x)
        with MemoryManager(MemoryConfig(enable_cpu_offload=False)) as manager:
            manager.wrap_model(oversized)
            oversized.to("cuda")
            assert manager.disk.info()["files"] == 12
            assert same(oversized(x.cuda()).cpu(), expected)
            assert manager.get_memory_summary()["system"]["total_demotions"] >= 12
        where = oversized[0].weight.device
        assert all(each.device == where for each in oversized.parameters())
        assert same(oversized(x.to(where)).cpu(), expected)


# --- what ends otherwise ----------------------------------------------------------------------------------------


def test_a_backward_that_raises_keeps_nothing() -> None:
    model = stack(3)
    with MemoryManager() as manager:
        manager.wrap_model(model)
        model.to("cuda")
        loss = model(torch.randn(2, WIDTH, device="cuda")).sum()

        def divide(_gradient: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

        model[0].weight.register_hook(divide)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        until("the pass is over", lambda: not manager.residency._backward)
        for unit in manager.residency.listed():
            assert manager.residency.evict(unit) or unit.tier == "cpu"


def test_a_saved_weight_that_is_looked_at_outside_of_a_pass_keeps_nothing() -> None:
    model = stack(2)
    with MemoryManager() as manager:
        manager.wrap_model(model)
        model.to("cuda")
        node = model(torch.randn(2, WIDTH, device="cuda", requires_grad=True)).grad_fn
        while not hasattr(node, "_saved_mat2"):
            node = node.next_functions[0][0]
        assert node._saved_mat2.is_cuda
        assert not manager.residency._backward


def test_sending_a_model_where_it_is_moves_nothing() -> None:
    model = stack(2).cuda()
    manager = auto_manage_model(model)
    x = torch.randn(2, WIDTH, device="cuda")
    with torch.no_grad():
        expected = model(x)
        before, copied = len(manager.residency.events()), manager.residency.copied_bytes
        for send in (lambda: model.to("cuda"), model.cuda, lambda: model.to(CUDA, torch.float32)):
            assert send() is model
        assert manager.residency.copied_bytes == copied
        assert len(manager.residency.events()) == before
        assert torch.equal(model(x), expected)
    manager.cleanup()


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_modules_that_are_gone_leave_nothing(tier: str, tmp_path: Path) -> None:
    manager = MemoryManager(MemoryConfig(enable_disk_offload=True, disk_cache_dir=str(tmp_path)))
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        model = stack(2)
        manager.wrap_model(model)
        model.to("cuda")
        with torch.no_grad():
            model(torch.randn(2, WIDTH, device="cuda"))
        for unit in manager.residency.listed():
            if tier != "gpu":
                manager.residency.offload(unit)
            if tier == "disk":
                assert manager.residency.demote(unit)
        files = [each for each in tmp_path.rglob("*.tensors") if each.is_file()]
        assert len(files) == (2 if tier == "disk" else 0)
        del model, unit
        gc.collect()
        assert manager.residency.listed() == []
        assert not [each for each in tmp_path.rglob("*.tensors") if each.is_file()]
    torch.cuda.empty_cache()
    assert free - torch.cuda.mem_get_info()[0] <= 4 << 20
    manager.cleanup()


def test_a_weight_outlives_its_module() -> None:
    with MemoryManager() as manager:
        model = nn.Linear(WIDTH, WIDTH)
        manager.wrap_module(model)
        model.to("cuda")
        with torch.no_grad():
            model(torch.randn(2, WIDTH, device="cuda"))
        weight, expected = model.weight, model.weight.detach().cpu().clone()
        del model
        gc.collect()
        assert manager.residency.listed() == []
        assert torch.equal(weight.detach().cpu(), expected)


TWO_DEVICES = """
import torch
from sire.memory import MemoryManager

with MemoryManager() as manager, torch.no_grad():
    layer = torch.nn.Linear(64, 64)
    x = torch.randn(2, 64)
    expected = layer(x)
    manager.wrap_module(layer)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        layer.to(device)
        found = layer(x.to(device))
        print(found.device, torch.allclose(found.cpu(), expected), manager.residency.listed()[0].ready)
        layer.offload_all()
"""


def with_two_devices(program: str) -> list[str]:
    """What the program printed."""
    environment = os.environ | {"SIRE_SIM_DEVICES": "2", "SIRE_SIM_MEMORY": "64MiB"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_module_that_is_sent_to_another_device_comes_there() -> None:
    assert with_two_devices(TWO_DEVICES) == [f"cuda:{index} True True" for index in (0, 1, 0)]


AT_THE_END = """
import atexit, threading, time, torch
from sire.memory import MemoryConfig, MemoryManager

model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)]).to("cuda")
manager = MemoryManager(MemoryConfig(vram_cap_gb=0.012))
manager.wrap_model(model)
x = torch.ones(1, 1024, device="cuda")

def forward():
    with torch.no_grad():
        model(x)

def work():
    threading.main_thread().join()
    time.sleep(0.2)
    forward()
    print("forward")

def save():
    forward()
    print(all(torch.equal(value.cpu(), kept[key]) for key, value in model.state_dict().items()))
    units = manager.residency.listed()
    print([unit.leases for unit in units if unit.leases], manager.residency._coming)
    manager.cleanup()
    print("over")

kept = {key: value.cpu() for key, value in model.state_dict().items()}
forward()
forward()
manager.residency.settle()
assert manager.residency.counts["prefetches"]
atexit.register(save)
threading.Thread(target=work).start()
"""


def test_when_the_interpreter_ends_layers_still_come_and_can_be_saved() -> None:
    """No new work was taken then: what would only have come early raised in the forward, and kept the layer leased."""
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["forward", "True", "[] set()", "over"], done.stderr


def test_without_another_thread_layers_come_when_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = stack(4), torch.randn(2, WIDTH, device="cuda")

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with torch.no_grad(), MemoryManager(MemoryConfig(vram_cap_gb=0.008)) as manager:
        expected = model(x.cpu())
        manager.wrap_model(model)
        model.to("cuda")
        with monkeypatch.context() as crowded:
            crowded.setattr(threading.Thread, "start", refuse)
            for _ in range(2):
                assert same(model(x).cpu(), expected)
            assert set(model.state_dict()) == set(stack(4).state_dict())
            assert not manager.residency._coming
        assert manager.residency.counts["prefetches"] == 0
        model(x)
        manager.residency.settle()
        assert manager.residency.counts["prefetches"] > 0


def test_a_lease_that_is_not_given_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_device: torch.device) -> None:
        raise KeyboardInterrupt

    with MemoryManager() as manager:
        layer = manager.wrap_module(nn.Linear(8, 8)).to("cuda")
        (unit,) = manager.residency.listed()
        monkeypatch.setattr(manager.residency, "_expect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer(torch.ones(1, 8, device="cuda"))
        assert unit.leases == 0
        monkeypatch.undo()


ON_BOTH = """
import torch
from sire.memory import MemoryManager

layers = [torch.nn.Linear(2560, 4096) for _ in range(2)]
expected = [layer.weight[0].clone() for layer in layers]
with MemoryManager() as manager:
    for index, layer in enumerate(layers):
        manager.wrap_module(layer).to(f"cuda:{index}")
for layer, row in zip(layers, expected):
    print(layer.weight.device, torch.equal(layer.weight[0].cpu(), row))
"""


def test_at_the_end_a_model_over_two_devices_is_on_both() -> None:
    """It ended on the CPU: what both devices were to hold was asked of each."""
    assert with_two_devices(ON_BOTH) == ["cuda:0 True", "cuda:1 True"]


def test_a_name_that_is_made_is_nobodys() -> None:
    layers = [nn.Linear(8, 8) for _ in range(4)]
    with MemoryManager() as manager:
        for layer, name in zip(layers, ("x-1", "x-2", "x", "x"), strict=True):
            manager.wrap_module(layer, name)
        assert sorted(manager.get_memory_summary()["modules"]) == ["x", "x-1", "x-2", "x-3"]
        assert len(manager.residency.listed()) == len(layers)


LOOKS = """
import torch
from sire.memory import MemoryMonitor

def look():
    print(sorted(monitor.look().gpus), torch._C._cuda_hasPrimaryContext(1))

monitor = MemoryMonitor()
torch.cuda.init()
look()
first = torch.ones(8, device="cuda:0")
look()
second = torch.ones(8, device="cuda:1")
look()
read = torch.cuda.mem_get_info
def fails(device):
    if device == 0:
        raise RuntimeError("CUDA error: out of memory")
    return read(device)
torch.cuda.mem_get_info = fails
look()
"""


def test_a_look_touches_no_device_that_nobody_uses_and_one_that_fails_hides_no_other() -> None:
    """Each look gave every process a context on every device, hundreds of MB, and a full one ended all looks."""
    assert with_two_devices(LOOKS) == ["[0] False", "[0] False", "[0, 1] True", "[1] True"]
