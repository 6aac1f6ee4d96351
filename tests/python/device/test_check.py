"""``SIRE_CHECK=1`` and `sire.checked`: use of a paused tensor is an exception, not a lost context."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import sire
import torch
from sire import _check

MIB = 1 << 20
MISUSES: dict[str, Callable[[torch.Tensor], object]] = {
    "add": lambda tensor: tensor + 1,
    "a view": lambda tensor: tensor[1:].view(-1, 1).t().sum(),
    "in place": lambda tensor: tensor.mul_(2),
    "out": lambda tensor: torch.add(torch.ones_like(tensor), 1, out=tensor),
    "in a list": lambda tensor: torch.cat([torch.ones(1, device="cuda"), tensor]),
    "foreach": lambda tensor: torch._foreach_add_([tensor], 1.0),
    "print": str,
    "cpu": lambda tensor: tensor.cpu(),
    "item": lambda tensor: tensor[3].item(),
    "clone": lambda tensor: tensor.clone(),
    "copy into": lambda tensor: tensor.copy_(torch.zeros(tensor.shape)),
    "copy from": lambda tensor: torch.empty(tensor.shape, device="cuda").copy_(tensor),
    "fill": lambda tensor: tensor.zero_(),
    "set item": lambda tensor: tensor.__setitem__(0, 5.0),
}


def make(tag: str, backup: sire._regions.Backup | None = "cpu") -> torch.Tensor:
    with sire.region(tag, backup=backup):
        return torch.arange(1024, dtype=torch.float32, device="cuda")


@pytest.mark.parametrize("misuse", MISUSES)
def test_use_of_a_paused_tensor_is_an_exception(tag: str, misuse: str) -> None:
    tensor = make(tag)
    before = tensor.clone()
    with sire.checked(), sire.paused(tag), pytest.raises(sire.PausedError, match=f"region '{tag}', which is paused"):
        MISUSES[misuse](tensor)
    assert torch.equal(tensor, before), "the context lives, and nothing was touched"


def test_what_touches_no_memory_is_allowed(tag: str) -> None:
    tensor = make(tag)
    other = torch.ones(1024, device="cuda")
    with sire.checked(), sire.paused(tag):
        view = tensor[2:].view(-1, 2).t().detach()
        assert torch.empty_like(tensor).shape == torch.zeros_like(tensor).shape == tensor.shape
        assert view.shape == (2, 511)
        assert float((other + 1).sum()) == 2048.0
    with sire.checked():
        assert float(view[0, 0]) == 2.0


def test_memory_that_pauses_leave_is_allowed(tag: str) -> None:
    with sire.region(f"{tag}/stays", backup="cpu"):
        stays = torch.ones(4 * MIB, device="cuda")
    with sire.region(f"{tag}/goes", backup="cpu"):
        goes = torch.ones(4 * MIB, device="cuda")
    sire.keep_resident(stays)
    with sire.checked(), sire.paused(tag):
        assert float(stays.sum()) == 4 * MIB
        with pytest.raises(sire.PausedError):
            goes.sum()


def test_backward_passes_and_their_threads_are_checked(tag: str) -> None:
    weight = make(tag).requires_grad_()
    loss = (weight * torch.ones(1024, device="cuda").requires_grad_()).sum()
    with sire.checked(), sire.paused(tag), pytest.raises(sire.PausedError, match="mul"):
        loss.backward()
    loss = (weight * 2).sum()
    with sire.checked():
        loss.backward()
    assert weight.grad is not None
    assert bool((weight.grad == 2).all())


def test_it_ends_with_its_block_and_belongs_to_its_thread(tag: str) -> None:
    tensor = make(tag)
    found: list[bool] = []

    def modes() -> bool:
        return bool(torch.utils._python_dispatch._get_current_dispatch_mode_stack())

    with sire.checked(), sire.checked():
        other = threading.Thread(target=lambda: found.append(modes()))
        other.start()
        other.join()
        found.append(modes())
    found.append(modes())
    assert found == [False, True, False]
    assert float(tensor[1]) == 1.0


WHOLE_PROCESS = """
import threading, sire, torch
with sire.region("weights", backup="cpu"):
    tensor = torch.ones(1024, device="cuda")
def attempt():
    try:
        print(float(tensor.sum()))
    except sire.PausedError as error:
        print(str(error).split(":")[0].split(" was")[0])
with sire.paused("weights"):
    attempt()
    thread = threading.Thread(target=attempt); thread.start(); thread.join()
    class Own(threading.Thread):
        def run(self): attempt()
    thread = Own(); thread.start(); thread.join()
attempt()
"""


def test_a_whole_process_with_its_threads() -> None:
    command = [sys.executable, "-c", WHOLE_PROCESS]
    variables = os.environ | {"SIRE_CHECK": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == ["aten.sum.default"] * 3 + ["1024.0"], done.stderr


def test_nothing_is_installed_unasked(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tag)
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []
    assert not hasattr(threading.Thread.start, "__wrapped__")
    monkeypatch.setenv("SIRE_CHECK", "perhaps")
    with pytest.raises(sire.InvalidArgumentError, match="SIRE_CHECK is 'perhaps'; it must be 1 or 0"):
        _check.wanted.__wrapped__()
