"""Managed models: they come when they are used and make way for others, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import managed
import pytest
import sire
import torch
from managed import layers, plainly
from measure import on_software_device
from running import line, running
from sire import _library, models
from sire.models import _pools
from torch import nn

MIB = 1 << 20
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As `managed.fresh`."""
    yield from managed.fresh()


class Block(nn.Module):
    """``mib`` MiB of weights; what it computes depends on all of them."""

    def __init__(self, seed: int, mib: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(mib * MIB // 4 // 512, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.sum() + self.weight[0, 0]


def blocks(count: int, mib: int = 4) -> tuple[list[Block], list[float]]:
    """Models, and what they answer for 1."""
    made = [Block(seed, mib).eval() for seed in range(count)]
    with torch.no_grad():
        return made, [float(each(torch.ones(()))) for each in made]


def answer(model: nn.Module, wrapper: Any) -> float:
    """What it answers for 1 on its device."""
    with torch.no_grad():
        return float(model(torch.ones((), device=wrapper.get_execution_device())))


def near(one: float, other: float) -> bool:
    """Sums in another order."""
    return abs(one - other) <= 1e-2 * max(1.0, abs(other))


def used() -> int:
    """The device's used bytes, as the driver counts them."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def test_the_seeds_quick_start(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(HERE.parent / "seed_sire.txt"))
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert printed == [
        "Model initial device: cpu",
        "Entering auto_manage context...",
        "Model is now on device: cuda:0",
        "Executing forward on device: cuda:0",
        "Exited auto_manage context.",
        "Model is now back on device: cpu",
    ]


def test_uses_are_counted() -> None:
    [model], [expected] = blocks(1)
    wrapper = sire.manage(model)
    assert sire.manage(model).user is wrapper.user
    with sire.auto_manage(model) as outer:
        with sire.auto_manage(wrapper) as inner:
            assert inner.user is outer.user
            assert near(answer(model, inner), expected)
        assert model.weight.is_cuda
        assert wrapper.is_loaded
    assert not model.weight.is_cuda
    wrapper.load()
    wrapper.load()
    wrapper.offload()
    assert model.weight.is_cuda
    wrapper.offload()
    assert not model.weight.is_cuda
    with pytest.raises(sire.InvalidArgumentError, match="more often"):
        wrapper.offload()
    context = sire.auto_manage(model)
    with context, context:
        assert wrapper.user.locks == 2
    assert wrapper.user.locks == 0


def test_several_come_together_or_not_at_all() -> None:
    made, expected = blocks(3)
    with sire.auto_manage(*made) as wrappers:
        assert isinstance(wrappers, tuple)
        assert [near(answer(m, w), e) for m, w, e in zip(made, wrappers, expected, strict=True)] == [True] * 3
    sire.setup_default_pools(vram_limit=9 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match="in use"):
        sire.auto_manage(*made).__enter__()
    assert not any(each.weight.is_cuda for each in made)
    with sire.auto_manage(*made[:2]):
        pass


def test_an_exception_ends_the_use() -> None:
    [model], _ = blocks(1)
    with pytest.raises(ZeroDivisionError), sire.auto_manage(model):
        raise ZeroDivisionError
    assert not model.weight.is_cuda


def test_models_make_way_for_one_another() -> None:
    sire.setup_default_pools(vram_limit=9 * MIB, release="lazy")
    made, expected = blocks(4)
    wrappers = [sire.manage(each) for each in made]

    def ask(index: int) -> str:
        before = len(sire.events())
        with sire.auto_manage(wrappers[index]) as wrapper:
            assert near(answer(made[index], wrapper), expected[index])
        return next(event.kind for event in sire.events()[before:] if event.kind in ("load", "hit"))

    assert [ask(i) for i in (0, 1, 0, 1)] == ["load", "load", "hit", "hit"]
    assert [ask(i) for i in (2, 1, 0)] == ["load", "hit", "load"]
    sire.manage(made[1], priority=1)
    # The last one that was used makes way for number 3, because number 1 is worth more.
    assert [ask(i) for i in (3, 1)] == ["load", "hit"]
    sire.pin(made[3])
    assert made[3].weight.is_cuda
    assert [ask(i) for i in (0, 2, 3)] == ["load", "load", "hit"]
    sire.unpin(made[3])
    totals = sire.summary()["totals"]
    assert totals["evict"] >= 4
    assert sire.evict() > 0
    assert sire.summary()["pools"]["cuda:0"]["used_bytes"] == 0


class Padded(nn.Module):
    """Reads a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full((), 2.0))

    def forward(self, packed: nn.utils.rnn.PackedSequence) -> torch.Tensor:
        return nn.utils.rnn.pad_packed_sequence(packed)[0] * self.by


@pytest.mark.parametrize("way", ["manage", "hook"])
def test_a_packed_sequence_is_an_argument(way: str) -> None:
    """It was taken apart and moved with the sizes that have to stay in host memory, which raised."""
    model = Padded()
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    if way == "hook":
        sire.AutoManageHook.manage_module(model)
    call = sire.manage(model) if way == "manage" else model
    assert call(packed).tolist() == [[2.0, 2.0], [2.0, 2.0], [2.0, 0.0]]


def test_what_was_said_about_a_model_can_be_said_anew_all_of_it_or_nothing() -> None:
    """``keep_alive=0`` did not end what an earlier call had said, and a call that was refused had changed the rest."""
    sire.setup_default_pools(vram_limit=9 * MIB, release="lazy")
    made, _ = blocks(3)
    user = sire.manage(made[0], keep_alive=3600.0, priority=2).user
    with pytest.raises(sire.InvalidArgumentError, match="mutable cannot be changed"):
        sire.manage(made[0], priority=9, keep_alive=1.0, inference_memory_estimator=7, mutable=True)
    assert (user.priority, user._keep_alive, user.inference_memory_estimator) == (2, 3600.0, None)
    sire.manage(made[0], keep_alive=0, priority=0)
    before = len(sire.events())
    for each in made:
        with sire.auto_manage(each):
            pass
    assert [each.name for each in sire.events()[before:] if each.kind == "evict"] == [user.name]


def test_what_is_kept_goes_only_when_nobody_else_is_left() -> None:
    """The least recently used one would go; `keep_alive` and `residency` spare it, and say so in the events."""
    sire.setup_default_pools(vram_limit=9 * MIB, release="lazy")
    made, expected = blocks(3)
    wrappers = [sire.manage(made[0], keep_alive=3600.0), sire.manage(made[1]), sire.manage(made[2])]

    def ask(index: int) -> list[str]:
        before = len(sire.events())
        with sire.auto_manage(wrappers[index]) as wrapper:
            assert near(answer(made[index], wrapper), expected[index])
        return [f"{each.kind} {each.name}" for each in sire.events()[before:] if each.kind in ("load", "hit", "evict")]

    names = [each.user.name for each in wrappers]
    assert ask(0) == [f"load {names[0]}"]
    assert ask(1) == [f"load {names[1]}"]
    assert sorted(ask(2)) == [f"evict {names[1]}", f"load {names[2]}"], "the one that was used last, not the kept one"
    assert ask(0) == [f"hit {names[0]}"]
    sire.setup_default_pools(vram_limit=9 * MIB, release="lazy", residency=3600.0)
    # Everybody was used just now: somebody goes all the same, and nobody is refused.
    for index in (1, 2, 1, 0):
        assert ask(index)[-1] in (f"load {names[index]}", f"hit {names[index]}")


def test_an_allocation_outside_takes_what_nobody_uses(mode: str) -> None:
    """In hook mode preload without Python; in hook mode torch the allocation is none that the library hears of."""
    sire.setup_default_pools(release="lazy")
    made, expected = blocks(4, mib=16)
    for each in made:
        with sire.auto_manage(each):
            pass
    assert sire.summary()["pools"]["cuda:0"]["used_bytes"] == 64 * MIB
    free, _ = torch.cuda.mem_get_info()
    if mode == "torch":
        sire.evict(32 * MIB)
    ballast = torch.empty(free + 24 * MIB, dtype=torch.uint8, device="cuda")
    assert 0 < sire.summary()["pools"]["cuda:0"]["used_bytes"] <= 32 * MIB
    with sire.auto_manage(made[0]) as wrapper:
        assert near(answer(made[0], wrapper), expected[0])
    del ballast


def test_ten_models_on_a_device_for_three() -> None:
    """A trace as users make it: few models are asked for often, most now and then."""
    budget = 3 * 8 * MIB + 2 * MIB
    sire.setup_default_pools(vram_limit=budget, release="lazy")
    made, expected = blocks(10, mib=8)
    wrappers = [sire.manage(each) for each in made]
    torch.zeros(1, device="cuda")
    base, peak = used(), 0
    chooser = random.Random(7)  # noqa: S311
    weights = [1 / (rank + 1) for rank in range(10)]
    hits = 0
    before = sum(wrapper.user.adopted.bytes_copied for wrapper in wrappers)
    loads = 0
    for index in chooser.choices(range(10), weights, k=60):
        first = len(sire.events())
        with sire.auto_manage(wrappers[index]) as wrapper:
            peak = max(peak, used() - base)
            assert near(answer(made[index], wrapper), expected[index])
        kinds = [event.kind for event in sire.events()[first:]]
        hits += "hit" in kinds
        loads += "load" in kinds
    assert hits + loads == 60
    assert hits >= 20
    assert peak <= budget + 2 * MIB
    copied = sum(wrapper.user.adopted.bytes_copied for wrapper in wrappers) - before
    assert copied == loads * 8 * MIB, "clean weights were copied back"


BESIDE = """
import sire, torch
sire.setup_default_pools(release="lazy")
made = [torch.nn.Linear(2048, 2048, bias=False) for _ in range(4)]
one = torch.ones(2048)
expected = [float(each(one).sum()) for each in made]

def serve(index):
    with torch.no_grad(), sire.auto_manage(made[index]) as wrapper:
        said = float(made[index](one.to(wrapper.get_execution_device())).sum())
    assert abs(said - expected[index]) <= 1e-2 * max(1.0, abs(expected[index])), index

def evicted():
    return sum(each.kind == "evict" for each in sire.events())

for index in (0, 1, 2, 0, 1, 2):
    serve(index)
print(evicted(), flush=True)
input()
for index in (3, 0, 1, 2, 3):
    serve(index)
print(evicted() > 0, flush=True)
"""

NEIGHBOUR = """
import torch
free = torch.cuda.mem_get_info()[0]
kept = torch.empty(free - (8 << 20), dtype=torch.uint8, device="cuda")
print("here", flush=True)
input()
"""


def test_what_other_processes_use_counts(tmp_path: Path) -> None:
    """Models stay while there is room; where another process has taken it, they make way for one another."""
    if not on_software_device():
        pytest.skip("fills the device")
    environment = {**os.environ, "SIRE_SIM_DIR": str(tmp_path), "SIRE_SIM_MEMORY": "192MiB"}
    pipes: dict[str, Any] = {"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running([sys.executable, "-c", BESIDE], **pipes) as server:
        assert line(server) == "0"
        with running([sys.executable, "-c", NEIGHBOUR], **pipes) as neighbour:
            assert line(neighbour) == "here"
            assert server.stdin is not None
            server.stdin.write("go\n")
            server.stdin.flush()
            assert line(server) == "True"


@pytest.mark.parametrize(("way", "limit"), [("memory", 1.05), ("source", 0.05)])
def test_host_memory_is_the_weights_once_or_not_at_all(way: str, limit: float, mode: str) -> None:
    """Measured by the program of scripts/bench (`host.overhead`), in a process of its own."""
    if mode != "torch":
        pytest.skip("the process is the same in every mode")
    program = Path(__file__).resolve().parents[3] / "benches" / "overhead.py"
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, str(program), way, "128"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == 0
    assert found["ratio"] <= limit


@pytest.mark.parametrize("faults", [0.0, 0.05])
def test_sixteen_threads(faults: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, luck, failed = _library.Library._call, random.Random(5), []  # noqa: S311

    def call(library: _library.Library, name: str, *arguments: Any) -> None:
        if name in ("sire_allocate", "sire_resume", "sire_pause", "sire_make_room") and luck.random() < faults:
            failed.append(name)
            raise sire.DriverError(f"{name} was made to fail")
        plain(library, name, *arguments)

    monkeypatch.setattr(_library.Library, "_call", call)
    sire.setup_default_pools(vram_limit=14 * MIB, release="lazy")
    made, expected = blocks(8, mib=4)
    wrappers = [sire.manage(each) for each in made]
    failures: list[BaseException] = []
    wrong: list[int] = []

    def work(seed: int) -> None:
        chooser = random.Random(seed)  # noqa: S311
        try:
            for _ in range(6):
                chosen = chooser.sample(range(8), chooser.choice([1, 1, 2]))
                with (
                    contextlib.suppress(ZeroDivisionError, sire.DriverError),
                    sire.auto_manage(*(made[i] for i in chosen)),
                ):
                    for i in chosen:
                        if not near(answer(made[i], wrappers[i]), expected[i]):
                            wrong.append(i)
                    if chooser.random() < 0.2:
                        raise ZeroDivisionError
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(120)
    assert not any(each.is_alive() for each in threads), "a deadlock"
    assert failures == []
    assert wrong == []
    assert bool(failed) == (faults > 0)
    assert all(wrapper.user.locks == 0 for wrapper in wrappers)
    monkeypatch.undo()
    for model, wrapper, right in zip(made, wrappers, expected, strict=True):
        with sire.auto_manage(model):
            assert near(answer(model, wrapper), right)


def test_who_waits_and_who_need_not() -> None:
    sire.setup_default_pools(vram_limit=5 * MIB)
    made, _ = blocks(2)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with sire.auto_manage(made[0]):
            entered.set()
            leave.wait(60)

    with sire.auto_manage(made[0]), pytest.raises(torch.OutOfMemoryError):
        # Nobody else could end a use.
        sire.auto_manage(made[1]).__enter__()
    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    with pytest.raises(torch.OutOfMemoryError):
        sire.auto_manage(made[1], wait=0.05).__enter__()
    threading.Timer(0.2, leave.set).start()
    with sire.auto_manage(made[1]):
        assert not made[0].weight.is_cuda
    thread.join()
    assert sire.summary()["totals"]["wait"] >= 1


def test_hooks_manage_a_module_by_themselves() -> None:
    [model], [expected] = blocks(1)
    hook = sire.AutoManageHook.manage_module(model)
    assert sire.AutoManageHook.manage_module(model) is hook
    assert str(hook.execution_device) == "cuda:0"
    with torch.no_grad():
        output = model(torch.ones(()))
    assert output.is_cuda
    assert near(float(output), expected)
    assert not model.weight.is_cuda
    with pytest.raises(TypeError), torch.no_grad():
        model(torch.ones(3), torch.ones(1))
    with pytest.raises((RuntimeError, TypeError)):
        model("no tensor")
    assert hook.am.user.locks == 0
    assert not model.weight.is_cuda
    hook.remove()
    with torch.no_grad():
        assert not model(torch.ones(())).is_cuda


def losses(model: nn.Module, device: str, steps: int, wrap: Any) -> list[float]:
    """A few steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(4, 32).to(device)
        optimizer.zero_grad()
        loss = wrap(model, x)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_training_with_a_hook_is_training() -> None:
    expected = losses(layers().cuda(), "cuda", 4, plainly)
    model = layers()
    hook = sire.AutoManageHook.manage_module(model)

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        loss = plainly(model, x)
        assert hook.am.user.locks == 1, "it is kept for backward"
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for number in range(4):
        torch.manual_seed(number)
        optimizer.zero_grad()
        loss = step(model, torch.randn(4, 32))
        loss.backward()
        assert hook.am.user.locks == 0
        assert not model[0].weight.is_cuda
        assert model[0].weight.grad is not None
        with sire.auto_manage(model):
            assert model[0].weight.grad.is_cuda
            optimizer.step()
        found.append(loss.item())
    assert found == expected
    with torch.enable_grad():
        output = model(torch.randn(4, 32))
    assert hook.am.user.locks == 1
    del output
    gc.collect()
    assert hook.am.user.locks == 0, "nobody can ask for a backward any more"


def test_a_backward_after_the_end_finds_the_model_again() -> None:
    expected = losses(layers().cuda(), "cuda", 1, plainly)
    model = layers()
    reference = layers().cuda()
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    with sire.auto_manage(model) as wrapper:
        loss = model(x.to(wrapper.get_execution_device())).square().mean()
    assert not model[0].weight.is_cuda
    loss.backward()
    assert not model[0].weight.is_cuda
    plainly(reference, x.cuda()).backward()
    assert loss.item() == expected[0]
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad.cpu())


@pytest.mark.parametrize("by_itself", [True, False], ids=["hook", "auto_manage"])
def test_a_graph_that_is_kept_can_be_gone_back_through_twice(by_itself: bool) -> None:
    reference, model = layers().cuda(), layers()
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    kept = plainly(reference, x.cuda())
    if by_itself:
        sire.AutoManageHook.manage_module(model)
        loss = plainly(model, x)
    else:
        with sire.auto_manage(model) as wrapper:
            loss = plainly(model, x.to(wrapper.get_execution_device()))
    for retain in (True, False):
        kept.backward(retain_graph=retain)
        loss.backward(retain_graph=retain)
        assert not model[0].weight.is_cuda, "nobody uses it between the two"
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one.grad.cpu(), other.grad.cpu())


def test_a_prefetch_loads_in_the_background() -> None:
    sire.setup_default_pools(vram_limit=9 * MIB)
    made, expected = blocks(3)
    with sire.auto_manage(made[0]) as first, sire.prefetch(made[1]) as coming:
        assert near(answer(made[0], first), expected[0])
        assert coming.wait(60)
        assert made[1].weight.is_cuda
        with sire.auto_manage(made[1]) as second:
            assert near(answer(made[1], second), expected[1])
        with sire.prefetch(made[2]) as hopeless, pytest.raises(torch.OutOfMemoryError):
            hopeless.wait(60)
    assert not made[1].weight.is_cuda


def test_memory_for_the_call_is_asked_for() -> None:
    sire.setup_default_pools(vram_limit=20 * MIB, release="lazy")
    made, _ = blocks(4)
    for each in made:
        with sire.auto_manage(each):
            pass
    assert sire.summary()["pools"]["cuda:0"]["used_bytes"] == 16 * MIB
    seen = []

    def estimate(model: nn.Module, x: torch.Tensor) -> int:
        seen.append((model, tuple(x.shape)))
        return 8 * MIB

    wrapper = sire.manage(made[3], inference_memory_estimator=estimate)
    wrapper(torch.ones(2))
    assert seen == [(made[3], (2,))]
    assert sire.summary()["pools"]["cuda:0"]["free_bytes"] >= 8 * MIB
    # A wish that cannot be met is no reason to refuse.
    sire.manage(made[0], inference_memory_estimator="1GiB")(torch.ones(2))


class Hungry(nn.Module):
    """Takes 4 bytes for each of ``n`` elements beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, n: torch.Tensor) -> torch.Tensor:
        return (torch.zeros(n.shape[0], device=self.weight.device) + self.weight).sum()


def test_what_a_call_takes_is_learned() -> None:
    estimator = sire.learned_estimator(first=7)
    model = Hungry().eval()
    wrapper = sire.manage(model, inference_memory_estimator=estimator)
    x = torch.empty(MIB)
    assert estimator(model, x) == 7
    with torch.no_grad():
        wrapper(x)
    assert 4 * MIB <= estimator(model, x) <= 40 * MIB
    small = torch.empty(1000)
    with torch.no_grad():
        wrapper(small)
    assert estimator(model, small) < 4 * MIB <= estimator(model, x)
    profiler = sire.Profiler(model)
    with torch.no_grad():
        profiler.run(x.cuda())
    assert profiler.bytes >= 4 * MIB


def test_a_pool_and_a_user_of_ones_own_in_60_lines() -> None:
    example = (HERE.parents[2] / "examples" / "custom_pool.py").read_text()
    code = [line for line in example.splitlines() if line.strip()]
    assert len(code) < 60
    space = runpy.run_path(str(HERE.parents[2] / "examples" / "custom_pool.py"))
    assert space["order"] == ["load a", "load b", "drop a", "load c", "drop b", "load a"]


def test_modules_go_when_nobody_has_them() -> None:
    torch.zeros(1, device="cuda")
    gc.collect()
    before = used()
    sire.setup_default_pools(release="lazy")
    [model], _ = blocks(1)
    with sire.auto_manage(model):
        pass
    assert used() > before
    del model
    gc.collect()
    models.get_resource_management().clean_user()
    assert used() == before


ON_THE_CPU = """
import runpy, sys, torch, sire
runpy.run_path(sys.argv[1])
assert [str(each) for each in sire.get_resource_management().get_devices()] == ["cpu", "disk"]
model = torch.nn.Linear(3, 2)
before = {name: each.clone() for name, each in model.state_dict().items()}
with sire.auto_manage(model, torch.nn.Linear(3, 2)) as (wrapper, _):
    assert wrapper.is_loaded and str(wrapper.get_execution_device()) == "cpu"
    model(torch.randn(1, 3)).sum().backward()
hook = sire.AutoManageHook.manage_module(model)
assert model(torch.randn(1, 3)).shape == (1, 2)
sire.pin(model); sire.unpin(model); sire.prefetch(model).wait(60)
assert sire.evict() == 0
assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
assert sire.summary()["objects"][0]["device"] == "cpu"
assert sire.Profiler(model).run(torch.randn(1, 3)).shape == (1, 2)
"""


@pytest.mark.parametrize("missing", ["device", "library"])
def test_without_a_device_or_the_library_models_stay_on_the_cpu(missing: str) -> None:
    changes = {"CUDA_VISIBLE_DEVICES": ""} if missing == "device" else {"SIRE_LIBRARY": "/nowhere/libsire_alloc.so"}
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "SIRE_HOOK_MODE")}
    program = [sys.executable, "-c", ON_THE_CPU, str(HERE.parent / "seed_sire.txt")]
    done = subprocess.run(
        program, check=False, env={**environment, **changes}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Model initial device: cpu"
    if missing == "device":
        assert lines[1] == "No CUDA device found, model will stay on CPU."
    else:
        assert "Executing forward on device: cpu" in lines
        assert lines[-1] == "Model is now back on device: cpu"


def test_a_user_that_was_forgotten_is_made_anew() -> None:
    [model], _ = blocks(1)
    first = sire.manage(model).user
    assert sire.manage(model).user is first
    models.get_resource_management().forget_user(first)
    first.close()
    second = sire.manage(model).user
    assert second is not first
    assert second in models.get_resource_management().users


def test_eviction_takes_any_name_of_a_device() -> None:
    sire.setup_default_pools(release="lazy")
    [model], _ = blocks(1)
    for name in ("cuda", "cuda:0", 0, torch.device("cuda")):
        with sire.auto_manage(model):
            pass
        assert sire.evict(device=name) > 0
        assert sire.evict(device=name) == 0
    assert sire.evict(device="cpu") == 0


def test_a_directory_that_is_not_there_yet_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIRE_DISK_DIR", str(tmp_path / "of" / "backups"))
    assert _pools.ResourcePoolDisk().get_device_free_size() > 0
    assert (tmp_path / "of" / "backups").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("SIRE_DISK_DIR", "/proc/missing")
    with pytest.raises(sire.BackupIoError, match=r"cannot be used: .*'/proc/missing'"):
        _pools.ResourcePoolDisk()


def test_copies_on_the_disk_go_where_the_library_was_told(tmp_path: Path) -> None:
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]

    sire.set_disk_directory(tmp_path)
    [model], _ = blocks(1)
    with sire.auto_manage(sire.manage(model, backup="disk").get_manage_object()):
        pass
    assert mapped()
    with pytest.raises(TypeError, match="wait"):
        sire.prefetch("some tag", wait=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="order"):
        sire.prefetch(model, order=[model])


def test_what_cannot_be_managed_says_so() -> None:
    with pytest.raises(sire.UnsupportedError, match="register_type_wrapper"):
        sire.manage(3.5)
    with pytest.raises(sire.InvalidArgumentError):
        sire.auto_manage()
    with pytest.raises(sire.InvalidArgumentError):
        sire.setup_default_pools(release="sometimes")  # type: ignore[arg-type]
    with pytest.raises(sire.InvalidArgumentError):
        sire.setup_default_pools(vram_limit="110%")
