"""Commits on real modules: exact to the bit whatever the order, all or nothing, and without copies of managed
weights.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sire
import torch
from patched import WIDTH, bits, lora, same, small
from sire.models.commits import (
    AutoManageCommitObjectProxy,
    CallableCommit,
    CommitABC,
    CommitObjectProxy,
    CommitWithAutoManage,
    HookCommit,
    InferenceOptimizerCommit,
    InferenceOptimizerHook,
    LoraCommit,
    OptimizationPlan,
    WeightCommit,
)
from torch import nn


def commits(count: int = 6) -> list[CommitABC[Any]]:
    """Of all kinds, most of them on the same weights."""

    def doubled(model: Any) -> Callable[[], None]:
        before = model[0].bias.detach().clone()
        with torch.no_grad():
            model[0].bias.mul_(2)

        def undo() -> None:
            with torch.no_grad():
                model[0].bias.copy_(before)

        return undo

    made: list[CommitABC[Any]] = []
    for i in range(count):
        kind = i % 4
        if kind == 0:
            made.append(LoraCommit(lora(i), scale=0.5))
        elif kind == 1:
            made.append(WeightCommit({"0.weight": torch.full((WIDTH, WIDTH), 0.1 * i), "2.bias": lambda w: w * 3}))
        elif kind == 2:
            made.append(CallableCommit(doubled))
        else:
            made.append(HookCommit({"0": lambda module, args, output: output + 1}))
    return made


# --- exactness -------------------------------------------------------------------------------------------------


def test_ten_thousand_random_rebases_end_as_a_fresh_load() -> None:
    model, chooser, available = small(), random.Random(1), commits(8)  # noqa: S311
    clean, x = bits(model), torch.ones(1, WIDTH, dtype=torch.bfloat16)
    plain = model(x)
    for step in range(10_000):
        proxy = CommitObjectProxy(model)
        for commit in chooser.sample(available, chooser.randint(0, 4)):
            proxy.add_commit(commit)
        proxy.apply_commit_stack()
        assert proxy.applied_commits == proxy.commit_stack
        if step % 1000 == 0:  # the naive twin: a fresh load with the same commits, applied once
            twin = small()
            for commit in proxy.commit_stack:
                commit.apply(twin)
            assert same(model, bits(twin)), f"step {step}"
    CommitObjectProxy(model).apply_commit_stack()
    assert same(model, clean)
    assert torch.equal(model(x), plain)
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("managed", [False, True])
def test_commits_count_inside_one_block_of_autocast(managed: bool) -> None:
    """It keeps the weights that it has cast, and computed with those of the proxy before."""
    model = nn.Linear(4, 4)
    plain: CommitObjectProxy[Any] = (AutoManageCommitObjectProxy if managed else CommitObjectProxy)(model)
    tens = plain.clone_and_add_commit(WeightCommit({"weight": torch.full((4, 4), 10.0)}))
    x, device = torch.ones(2, 4), "cuda" if managed else "cpu"

    def run(proxy: CommitObjectProxy[Any]) -> torch.Tensor:
        with proxy as used:
            result: torch.Tensor = used(x.to(device)).detach().cpu()
        return result

    with torch.autocast(device, torch.bfloat16):
        apart = run(plain)
    with torch.autocast(device, torch.bfloat16):
        other = run(tens)
    assert not torch.equal(apart, other)
    with torch.autocast(device, torch.bfloat16):
        for _ in range(2):
            assert torch.equal(run(plain), apart)
            assert torch.equal(run(tens), other)


@pytest.mark.parametrize("stacks", [("AB", "B"), ("AB", "BC"), ("ABC", "AC"), ("A", ""), ("AB", "ABC")])
def test_the_longest_common_prefix_stays(stacks: tuple[str, str]) -> None:
    log: list[str] = []

    def named(name: str) -> CallableCommit[list[str]]:
        def apply(obj: list[str]) -> Callable[[list[str]], None]:
            obj.append(name)
            log.append(f"+{name}")

            def revert(base: list[str]) -> None:
                assert base.pop() == name
                log.append(f"-{name}")

            return revert

        return CallableCommit(apply)

    class Names(list[str]):
        pass

    base, by_name = Names(), {name: named(name) for name in "ABC"}
    for stack in stacks:
        proxy = CommitObjectProxy[Any](base)
        for name in stack:
            proxy.add_commit(by_name[name])
        log.clear()
        assert "".join(proxy.apply_commit_stack()) == stack
    first, second = stacks
    common = len([1 for i in range(min(len(first), len(second))) if first[: i + 1] == second[: i + 1]])
    assert log == [f"-{name}" for name in reversed(first[common:])] + [f"+{name}" for name in second[common:]]


def test_one_commit_on_two_objects_reverts_each_to_its_own() -> None:
    one, two = small(), small()
    with torch.no_grad():
        two[0].weight.add_(1)
    first, second, commit = bits(one), bits(two), WeightCommit({"0.weight": torch.ones(WIDTH, WIDTH)})
    for model in (one, two):
        CommitObjectProxy(model).add_commit(commit).apply_commit_stack()
    for model in (one, two):
        CommitObjectProxy(model).revert_all()
    assert same(one, first)
    assert same(two, second)


# --- all or nothing ----------------------------------------------------------------------------------------------


def failing(model: Any) -> None:
    model.extra = 1
    model[0].register_forward_hook(lambda *_: None)
    del model[2]
    raise ValueError("on purpose")


@pytest.mark.parametrize(
    "bad",
    [
        CallableCommit(failing),
        WeightCommit({"0.weight": torch.ones(WIDTH, WIDTH), "2.weight": lambda w: w[:1]}),
        WeightCommit({"0.weight": torch.ones(WIDTH, WIDTH), "nowhere": torch.ones(1)}),
        LoraCommit(lora(1, names=("0", "7"))),
        HookCommit({"0": print, "nowhere": print}),
    ],
)
def test_a_failing_commit_leaves_what_was_before(bad: CommitABC[Any]) -> None:
    model = small()
    good = commits(4)
    proxy = CommitObjectProxy(model).add_commit(good[0]).add_commit(good[1])
    proxy.apply_commit_stack()
    before, children = bits(model), len(model)
    with pytest.raises((ValueError, sire.SireError)):
        CommitObjectProxy(model).add_commit(good[0]).add_commit(good[2]).add_commit(bad).apply_commit_stack()
    assert proxy.applied_commits == (good[0], good[1])
    assert same(model, before)
    assert len(model) == children
    assert not hasattr(model, "extra")
    assert not model[0]._forward_hooks
    proxy.revert_all()
    assert same(model, bits(small()))


@pytest.mark.parametrize("captures", [False, True])
def test_a_commit_keeps_nothing_of_an_object_that_is_gone(captures: bool) -> None:
    """What would revert it stayed in the commit, by the object's address: with the weights, and for whoever came to
    that address next.
    """
    model = small()
    commit: CommitABC[Any] = CallableCommit(lambda model: lambda: model) if captures else commits(1)[0]
    gone = [weakref.ref(each) for each in (model, model[0].weight)]
    with CommitObjectProxy(model).add_commit(commit):
        assert callable(commit.get_revert_callable(model))
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]
    with pytest.raises(sire.InvalidArgumentError, match="not applied"):
        commit.get_revert_callable(small())


def pickled(commit: CommitABC[Any]) -> Any:
    return pickle.loads(pickle.dumps(commit))  # noqa: S301 - its own


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_of_a_commit_is_another_one(copied: Callable[[Any], Any]) -> None:
    """It had the identity of the first one: what was changed in it was not applied, since the object had it already."""
    model = small(torch.float32)
    clean = bits(model)
    first = WeightCommit({"0.weight": torch.ones(WIDTH, WIDTH)})
    proxy = CommitObjectProxy(model).add_commit(first)
    proxy.apply_commit_stack()
    assert proxy.state_uuid == first.commit_uuid
    other = copied(first)
    other.scale = 5.0
    with pytest.raises(sire.InvalidArgumentError, match="not applied"):
        other.get_revert_callable(model)
    with CommitObjectProxy(model).add_commit(other):
        assert torch.equal(bits(model)["0.weight"], clean["0.weight"] + 5)
    assert other.commit_uuid != first.commit_uuid
    proxy.revert_all()
    assert same(model, clean)


class Named:
    """An object that knows which commits it has."""

    def __init__(self) -> None:
        self.names: list[str] = []


class Name(CommitABC[Named]):
    def __init__(self, name: str) -> None:
        self.name = name

    def apply(self, obj: Named, **_: Any) -> Callable[[Named], object]:
        if self.name == "bad":
            raise ValueError("on purpose")
        obj.names.append(self.name)
        return lambda obj: obj.names.pop()


def test_a_commit_that_is_in_its_old_place_again_does_not_keep_those_before_it() -> None:
    """The way back counted it as what had never been reverted, and left the commit before it in the object."""
    named = Named()
    first, second, other, bad = (Name(name) for name in ("first", "second", "other", "bad"))
    outer = CommitObjectProxy(named).add_commit(first).add_commit(second)
    inner = CommitObjectProxy(named).add_commit(other).add_commit(second).add_commit(bad)
    with outer:
        with pytest.raises(ValueError, match="on purpose"), inner:
            pytest.fail("entered")
        assert named.names == ["first", "second"]
    outer.revert_all()
    assert named.names == []


def test_hooks_are_hung_in_all_or_none() -> None:
    """The hooks before the one that PyTorch refused stayed in the module."""
    model = small()
    model[2].register_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="backward hooks"):
        HookCommit({"0": lambda *_: None, "2": lambda *_: None}, kind="backward").apply(model)
    assert not model[0]._backward_hooks
    assert len(model[2]._backward_hooks) == 1


def test_a_commit_that_breaks_weights_it_did_not_name_is_told_and_stops_everything() -> None:
    model = small()

    def careless(model: Any) -> None:
        with torch.no_grad():
            model[0].weight.zero_()
        raise ValueError("on purpose")

    proxy = CommitObjectProxy(model)
    with pytest.raises(ValueError, match="on purpose"):
        proxy.clone_and_add_callable_commit(careless).apply_commit_stack()
    with pytest.raises(sire.SireError, match=r"0\.weight"):
        proxy.apply_commit_stack()
    model.load_state_dict(small().state_dict())
    proxy.forget()
    assert proxy.apply_commit_stack() is model
    with pytest.raises(ValueError, match="on purpose"):
        proxy.clone_and_add_callable_commit(careless, touches=["0.weight"]).apply_commit_stack()
    assert same(proxy.apply_commit_stack(), bits(small()))


def test_a_way_back_that_breaks_weights_stops_everything() -> None:
    """A commit that is applied again on the way back wrote a weight that it does not name, and raised. The error said
    that the call can be repeated, and later uses gave the written weights without a word.
    """
    model, times = small(), 0

    def careless(model: Any) -> Callable[[], None]:
        nonlocal times
        times += 1
        if times > 1:
            with torch.no_grad():
                model[0].weight.zero_()
            raise ValueError("on purpose")
        return lambda: None

    base = CommitObjectProxy(model)
    base.clone_and_add_callable_commit(careless).apply_commit_stack()
    with pytest.raises(sire.SireError, match=r"state .* is not known: .*0\.weight"):
        base.clone_and_add_callable_commit(failing).apply_commit_stack()
    with pytest.raises(sire.SireError, match=r"0\.weight"), base:
        pytest.fail("entered")
    model.load_state_dict(small().state_dict())
    base.forget()
    assert base.apply_commit_stack() is model


def test_a_way_back_that_breaks_nothing_can_be_repeated() -> None:
    named, first = Named(), Name("first")
    outer = CommitObjectProxy(named).add_commit(first)
    outer.apply_commit_stack()
    first.name = "bad"
    with pytest.raises(sire.SireError, match=r"and so did the way back .*can be repeated"):
        CommitObjectProxy(named).add_commit(Name("bad")).apply_commit_stack()
    first.name = "first"
    assert outer.apply_commit_stack().names == ["first"]


@pytest.mark.parametrize(
    "bad",
    [
        WeightCommit({"0.weight": torch.ones(WIDTH, WIDTH), "2.weight": lambda w: w[:1]}),
        CallableCommit(failing, touches=["0.weight"]),
    ],
)
def test_what_cannot_be_restored_is_told_with_what_failed_first(
    bad: CommitABC[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure to restore hid why the commit had failed, and the half-written weights passed for clean ones."""
    from sire.models._undo import Undo

    def restore(_: Undo) -> None:
        raise RuntimeError("no way back")

    model = small()
    proxy = CommitObjectProxy(model).add_commit(bad)
    with monkeypatch.context() as patch:
        patch.setattr(Undo, "restore", restore)
        with pytest.raises((ValueError, sire.InvalidArgumentError), match=r"on purpose|shape"):
            proxy.apply_commit_stack()
    assert not hasattr(model, "extra")
    with pytest.raises(sire.SireError, match=r"not known.*no way back"):
        proxy.revert_all()


# --- proxies -----------------------------------------------------------------------------------------------------


def test_proxies_nest_and_threads_take_turns() -> None:
    model = small(torch.float32)
    plain = CommitObjectProxy(model)
    one = plain.clone_and_add_commit(WeightCommit({"0.bias": torch.full((WIDTH,), 1.0)}))
    two = plain.clone_and_add_commit(WeightCommit({"0.bias": torch.full((WIDTH,), 2.0)}))
    base = model[0].bias.detach().clone()
    with one:
        with two:
            assert torch.equal(model[0].bias, base + 2)
            with one:
                assert torch.equal(model[0].bias, base + 1)
            assert torch.equal(model[0].bias, base + 2)
        assert torch.equal(model[0].bias, base + 1)
    wrong: list[object] = []

    def work(proxy: CommitObjectProxy[Any], value: float) -> None:
        for _ in range(100):
            with proxy as current:
                if not torch.equal(current[0].bias, base + value):
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=each) for each in ((one, 1.0), (two, 2.0), (plain, 0.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_revert_on_exit_also_after_an_exception() -> None:
    model = small()
    clean = bits(model)
    proxy = CommitObjectProxy(model, revert_on_exit=True).add_commit(LoraCommit(lora(1)))
    with pytest.raises(ZeroDivisionError), proxy:
        assert not same(model, clean)
        _ = 1 / 0
    assert same(model, clean)


def test_a_clone_has_a_stack_of_its_own() -> None:
    proxy = CommitObjectProxy(small())
    commit = commits(1)[0]
    clone = proxy.clone().add_commit(commit)
    assert proxy.commit_stack == ()
    assert clone.clone().commit_stack == (commit,)
    assert clone.base_object is proxy.base_object
    with pytest.raises(sire.InvalidArgumentError, match="already"):
        clone.add_commit(commit)


# --- managed modules ---------------------------------------------------------------------------------------------


def test_a_managed_module_needs_no_second_copy_and_comes_back_clean() -> None:
    sire.setup_default_pools()
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    clean, x = bits(model), torch.randn(1, 512)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected[0].weight.add_(1)
    proxy = AutoManageCommitObjectProxy(model).add_commit(WeightCommit({"0.weight": torch.ones(512, 512)}))
    from sire.models._undo import Undo

    made: list[Undo] = []
    before = Undo.save

    def save(self: Undo, tensor: Any) -> None:
        before(self, tensor)
        made.append(self)

    Undo.save = save  # type: ignore[method-assign]
    try:
        for _ in range(2):
            with proxy as current, torch.no_grad():
                assert next(current.parameters()).device.type == proxy.am.get_execution_device().type
                assert torch.allclose(current(x.to(proxy.am.get_execution_device())).cpu(), expected(x), atol=1e-2)
            assert same(model, clean)
            assert next(model.parameters()).device.type == "cpu"
    finally:
        Undo.save = before  # type: ignore[method-assign]
    assert made
    if torch.cuda.is_available():
        assert sum(each.bytes_saved for each in made) == 0, "the host's copy is the undo log"
    with pytest.raises(sire.InvalidArgumentError, match="inside"):
        proxy.apply_commit_stack()


def reverting(fails: list[str]) -> CallableCommit[Any]:
    """A commit that changes nothing, whose revert fails as often as it is told."""

    def revert() -> None:
        if fails:
            raise ValueError(fails.pop())

    return CallableCommit(lambda _: revert)


def test_a_revert_that_fails_at_the_end_of_a_use_does_not_make_patched_weights_the_plain_ones() -> None:
    """The module left with a commit, so that the host's copy, from which the commit was to be undone, had it too."""
    sire.setup_default_pools()
    model, fails = small(torch.float32), ["on purpose"]
    clean = bits(model)
    patch = WeightCommit({"0.weight": torch.ones(WIDTH, WIDTH)})
    proxy = AutoManageCommitObjectProxy(model).add_commit(patch).add_commit(reverting(fails))
    with pytest.raises(ValueError, match="on purpose"), proxy:
        pass
    assert proxy.applied_commits == proxy.commit_stack
    assert torch.equal(bits(model)["0.weight"], clean["0.weight"] + 1)
    with proxy as current:
        assert torch.equal(bits(current)["0.weight"], clean["0.weight"] + 1)
    assert same(model, clean)


def test_a_use_that_fails_keeps_what_the_commits_before_it_had_written_over() -> None:
    """The way back applies them again, and outlives the use: the host's copy is not theirs to be undone from."""
    sire.setup_default_pools()
    model = small(torch.float32)
    clean = bits(model)
    plain = CommitObjectProxy(model).add_commit(WeightCommit({"0.weight": torch.ones(WIDTH, WIDTH)}))
    with sire.auto_manage(model):
        plain.apply_commit_stack()
        with pytest.raises(ValueError, match="on purpose"):
            AutoManageCommitObjectProxy(model).add_commit(CallableCommit(failing)).__enter__()
    assert torch.equal(bits(model)["0.weight"], clean["0.weight"] + 1)
    plain.revert_all()
    assert same(model, clean)


def test_a_commit_learns_where_its_object_runs() -> None:
    seen: list[Any] = []

    class Asks(CommitWithAutoManage[Any]):
        def apply(self, obj: Any, **kwargs: Any) -> Callable[[Any], None]:
            seen.append(self.am.get_execution_device())
            return lambda _: None

    proxy = AutoManageCommitObjectProxy(small()).add_commit(Asks())
    with proxy:
        assert seen == [proxy.am.get_execution_device()]
    with pytest.raises(sire.InvalidArgumentError, match="AutoManageCommitObjectProxy"):
        CommitObjectProxy(small()).add_commit(Asks()).apply_commit_stack()


def test_the_inference_optimizer_plans_once_and_is_taken_back(tmp_path: Path) -> None:
    model, x = small(torch.float32), torch.ones(1, WIDTH)
    expected = model(x)
    proxy = CommitObjectProxy(model).add_commit(InferenceOptimizerCommit(tmp_path))
    with proxy as current:
        assert torch.equal(current(x), expected)
        assert torch.equal(current(x), expected)
    (kept,) = tmp_path.glob("plan-*.json")
    plan = OptimizationPlan.from_json(kept.read_text())
    assert plan.order == ["0", "2"]
    assert plan.module_footprints["0"] == 4 * (WIDTH * WIDTH + WIDTH)
    assert [(each.trigger_module, each.module_to_prefetch) for each in plan.prefetch_schedule] == [
        ("0", "2"),
        ("2", "0"),
    ]
    proxy.revert_all()
    assert type(model[0]) is nn.Linear
    hook = InferenceOptimizerHook(tmp_path)
    hook.attach(model)
    assert hook.plan == plan
    assert torch.equal(model(x), expected)
    hook.detach()


def doubled(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        LoraCommit({"0.lora_A.weight": torch.ones(2, WIDTH), "0.lora_B.weight": torch.ones(WIDTH, 2)}),
        WeightCommit({"0.weight": lambda weight: weight * 2}),
        CallableCommit(doubled, touches=["0.weight"]),
    ],
)
@pytest.mark.parametrize("policy", ["cpu", "disk"])
def test_weights_of_layers_on_the_disk_can_be_changed(policy: str, change: CommitABC[Any]) -> None:
    """What stands for the content of a weight on the disk was saved, changed and restored; writing to it failed."""
    model, x = small(torch.float32), torch.ones(1, WIDTH)
    clean, expected = bits(model), small(torch.float32)
    CommitObjectProxy(expected).add_commit(change).apply_commit_stack()
    proxy = CommitObjectProxy(model).add_commit(InferenceOptimizerCommit(default_offload_policy=policy))
    proxy.add_commit(change)
    for _ in range(2):
        with proxy as current:
            assert torch.allclose(current(x), expected(x), atol=1e-4)
        proxy.revert_all()
        assert same(model, clean)


def test_layers_of_a_managed_model_stay_where_the_model_is() -> None:
    """Those that were to go to the disk cannot leave the device while the model is loaded: entering failed."""
    sire.setup_default_pools()
    model, x = small(torch.float32), torch.ones(1, WIDTH)
    clean, expected = bits(model), model(x).detach()
    commit = InferenceOptimizerCommit(default_offload_policy="disk")
    proxy = AutoManageCommitObjectProxy(model).add_commit(commit)
    for _ in range(2):
        with proxy as current, torch.no_grad():
            found = current(x.to(proxy.am.get_execution_device()))
            assert torch.allclose(found.cpu(), expected, atol=1e-5)
        assert same(model, clean)


def test_weights_of_a_managed_model_are_changed_whatever_the_default_device_is() -> None:
    """Their copy in host memory was looked for on the default device."""
    sire.setup_default_pools()
    model = small(torch.float32)
    clean = bits(model)
    torch.set_default_device("cuda")
    try:
        change = WeightCommit({"0.weight": torch.ones(WIDTH, WIDTH)})
        with AutoManageCommitObjectProxy(model).clone_and_add_commit(change) as current:
            assert torch.equal(current[0].weight.cpu(), clean["0.weight"] + 1)
        with AutoManageCommitObjectProxy(model) as current:
            assert same(current, clean)
    finally:
        torch.set_default_device(None)
