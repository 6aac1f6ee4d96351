"""Threads and processes that PyTorch starts are in no region, wherever their caller is: backward passes, data loaders.

In hook mode ``allocator``, where everything is in a region, they are in ``"default"``.
"""

from __future__ import annotations

import threading

import pytest
import sire
import torch
from measure import MIB
from sire import _library
from torch.utils.data import DataLoader, Dataset


def region_of(tensor: torch.Tensor) -> str | None:
    """The tag of the region that holds a tensor; None outside of all."""
    library = _library.load()
    if not library.owns(tensor.data_ptr()):
        return None
    number = library.allocation(tensor.data_ptr()).region
    return next(str(each["tag"]) for each in sire.stats()["regions"] if each["region"] == number)


@pytest.fixture
def outside(mode: str) -> str | None:
    """The region of what threads allocate that have entered none."""
    return "default" if mode == "allocator" else None


def test_what_a_backward_pass_allocates_is_outside(tag: str, outside: str | None) -> None:
    threads: list[int] = []
    with sire.region(tag, backup="cpu"):
        weight = torch.full((MIB,), 2.0, device="cuda", requires_grad=True)
        weight.register_hook(lambda _: threads.append(threading.get_ident()))
        (weight * weight).sum().backward()
    assert threads
    assert threading.get_ident() not in threads, "PyTorch computes gradients in a thread of its own"
    assert region_of(weight) == tag
    assert weight.grad is not None
    assert region_of(weight.grad) == outside
    with sire.paused(tag):
        assert bool((weight.grad == 4).all())
        assert float(weight.grad.mul_(2)[5]) == 8
    assert bool((weight == 2).all())
    with sire.region(tag, backup="cpu"):
        (weight * 3).sum().backward()
    assert bool((weight.grad == 11).all())
    assert region_of(weight.grad) == outside


def test_a_backward_pass_that_enters_the_region_is_inside(tag: str) -> None:
    made: list[torch.Tensor] = []

    def keep(gradient: torch.Tensor) -> None:
        with sire.region(tag, backup="cpu"):
            made.append(gradient * 5)

    weight = torch.ones(MIB, device="cuda", requires_grad=True)
    weight.register_hook(keep)
    (weight * 3).sum().backward()
    assert region_of(made[0]) == tag
    with sire.paused(tag):
        pass
    assert bool((made[0] == 15).all())


class Numbers(Dataset[tuple[torch.Tensor, bool]]):
    """Rows of one number each, and whether the process that makes them was told that it has no device."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, bool]:
        try:
            sire.pause()
        except sire.InactiveError:
            return torch.full((MIB // 4,), float(index)), True
        return torch.full((MIB // 4,), float(index)), False


class Batch:
    """It is pinned by the loader's own thread, which takes memory of the device besides."""

    def __init__(self, items: list[tuple[torch.Tensor, bool]]) -> None:
        self.rows = torch.stack([row for row, _ in items])
        self.refused = all(refused for _, refused in items)
        self.thread = 0
        self.made: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        self.rows = self.rows.pin_memory()
        self.thread = threading.get_ident()
        self.made = torch.full((MIB,), 6.0, device="cuda")
        return self


def test_a_data_loaders_workers_and_threads_are_outside(tag: str, outside: str | None) -> None:
    with sire.region(tag, backup="cpu"):
        loader = DataLoader(
            Numbers(),
            batch_size=4,
            num_workers=2,
            collate_fn=Batch,
            pin_memory=True,
            multiprocessing_context="fork",
            timeout=120,
        )
        batches = list(loader)
        copies = [batch.rows.to("cuda", non_blocking=True) for batch in batches]
    assert len(batches) == 3
    assert all(batch.refused for batch in batches), "a forked child has no device"
    assert all(batch.thread not in (0, threading.get_ident()) for batch in batches)
    assert {region_of(copy) for copy in copies} == {tag}
    made = [batch.made for batch in batches if batch.made is not None]
    assert [region_of(each) for each in made] == [outside] * 3
    expected = [torch.arange(4 * n, 4 * n + 4.0).repeat_interleave(MIB // 4).reshape(4, -1) for n in range(3)]
    with sire.paused(tag):
        for batch, rows, each in zip(batches, expected, made, strict=True):
            assert batch.rows.is_pinned()
            assert region_of(batch.rows) is None
            assert torch.equal(batch.rows, rows)
            assert bool((each == 6).all())
    assert all(torch.equal(copy.cpu(), rows) for copy, rows in zip(copies, expected, strict=True))
