"""Random sequences of calls on a small device, compared with a naive twin.

The twin has a copy of every tensor on the host; pauses and resumes are nothing to it. Whatever a sequence has done, a
resident tensor has its twin's bytes, at the address where it was made. Calls may fail for want of memory: the device of
this file is small, and so is what backups may take. Then, too, nothing is lost that has a backup.

`SIRE_TEST_SEQUENCES=N` tries N sequences that were not tried before, instead of the few that are the same in every run.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random, SystemRandom
from typing import Any

import pytest
import sire
import torch

KIB, MIB = 1 << 10, 1 << 20
SHORT = (sire.OutOfMemoryError, sire.OutOfBackupSpaceError, torch.OutOfMemoryError)
"""What a call may fail with: memory."""
NAMES = ("one", "one/part", "other")
"""The first two come and go together when the first is named."""
POLICIES: tuple[dict[str, Any], ...] = (
    {"backup": None},
    {"backup": None, "zero_fill": True},
    {"backup": "cpu"},
    {"backup": "cpu", "retain": True},
    {"backup": "cpu", "pageable": True},
    {"backup": "cpu", "immutable": True},
    {"backup": "cpu", "verify": "hash"},
    {"backup": "cpu", "verify": "bytes"},
    {"backup": "disk"},
    {"backup": "disk", "verify": "hash"},
    {"backup": "auto"},
    {"backup": "auto", "immutable": True},
    {"backup": "auto", "verify": "hash"},
)


@dataclass(eq=False, repr=False)
class Kept:
    """A tensor, where it was made, and what is in it; None if nobody knows."""

    tensor: torch.Tensor
    twin: torch.Tensor | None
    address: int


@dataclass(eq=False, repr=False)
class Tag:
    name: str
    policy: dict[str, Any]
    kept: list[Kept] = field(default_factory=list)

    @property
    def region(self) -> sire.Region:
        return sire.region(self.name, **self.policy)

    @property
    def paused(self) -> bool:
        return self.region.paused

    def wrote(self, tensor: torch.Tensor) -> None:
        """Memory that was promised not to change has."""
        if self.policy.get("immutable"):
            sire.changed(tensor)

    def lose(self, certainly: bool = True) -> None:
        """The memory was thrown away, or may have been."""
        if self.policy["backup"] is None:
            zeros = certainly and self.policy.get("zero_fill")
            for kept in self.kept:
                kept.twin = torch.zeros(kept.tensor.numel(), dtype=torch.uint8) if zeros else None

    def check(self) -> None:
        for kept in self.kept:
            assert kept.tensor.data_ptr() == kept.address
            if kept.twin is not None:
                same = torch.equal(kept.tensor.cpu(), kept.twin)
                assert same, f"{kept.tensor.numel()} bytes at {kept.address:#x} of {self.name}, {self.policy}"


def content(random: Random, size: int) -> torch.Tensor:
    """Pages that are alike, or none like another."""
    value = random.randrange(256)
    if random.random() < 0.3:
        return torch.full((size,), value, dtype=torch.uint8)
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(value))


class World:
    """The tags of one sequence, and what can be done to them."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)  # noqa: S311
        self.root = f"sequence{seed}"
        self.tags = {name: Tag(f"{self.root}/{name}", self.random.choice(POLICIES)) for name in NAMES}
        for name in NAMES:
            print(name, self.tags[name].policy)

    def step(self) -> None:
        """One call that says something in the state that the tag is in."""
        name = self.random.choice(NAMES)
        calls = WHILE_PAUSED if self.tags[name].paused else WHILE_RESIDENT
        (what,) = self.random.choices(list(calls), list(calls.values()))
        print(what.__name__, name)
        what(self, name)
        self.check()

    def maybe(self, chance: float = 0.5) -> bool:
        return self.random.random() < chance

    def under(self, name: str) -> list[Tag]:
        return [self.tags[other] for other in NAMES if other == name or other.startswith(f"{name}/")]

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def allocate(self, name: str) -> None:
        tag = self.tags[name]
        largest = self.random.choice((4 * KIB, MIB, 4 * MIB, 24 * MIB))
        size = self.random.choice((self.random.randrange(1, largest), largest))
        try:
            with tag.region:
                tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
        except SHORT:
            return
        twin = content(self.random, size)
        tensor.copy_(twin)
        tag.wrote(tensor)
        tag.kept.append(Kept(tensor, twin, tensor.data_ptr()))

    def refuse(self, name: str) -> None:
        with pytest.raises(sire.PausedError), self.tags[name].region:
            pass

    def free(self, name: str) -> None:
        kept = self.tags[name].kept
        if kept:
            del kept[self.random.randrange(len(kept))]

    def write(self, name: str) -> None:
        tag = self.tags[name]
        if not tag.kept:
            return
        kept = self.random.choice(tag.kept)
        size = kept.tensor.numel()
        if kept.twin is None:
            kept.twin = content(self.random, size)
            kept.tensor.copy_(kept.twin)
        first, value = self.random.randrange(size), self.random.randrange(256)
        part = slice(first, first + self.random.randrange(1, 3 * MIB))
        stream = torch.cuda.Stream() if self.maybe() else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            kept.tensor[part].fill_(value)
        kept.tensor.record_stream(stream)
        torch.cuda.current_stream().wait_stream(stream)
        kept.twin[part] = value
        tag.wrote(kept.tensor)

    def pause(self, name: str) -> None:
        leaving = [tag for tag in self.under(name) if not tag.paused]
        try:
            sire.pause(self.path(name), live_only=self.maybe(0.7), release="lazy" if self.maybe(0.3) else "now")
        except SHORT:
            assert not any(tag.paused for tag in leaving)
        else:
            assert all(tag.paused for tag in leaving)
            for tag in leaving:
                tag.lose()

    def resume(self, name: str) -> None:
        wanted = self.under(name)
        tensors = [kept.tensor for tag in wanted for kept in tag.kept]
        order = self.random.sample(tensors, len(tensors)) if tensors and self.maybe() else None
        try:
            sire.resume(self.path(name), order=order)
        except SHORT:
            return
        assert not any(tag.paused for tag in wanted)

    def resume_behind(self, name: str) -> None:
        """What is ready can be used while the rest is on its way."""
        cancelled = self.maybe(0.3)
        progress = sire.resume(self.path(name), non_blocking=True)
        if cancelled:
            progress.cancel()
        try:
            for kept in (kept for tag in self.under(name) for kept in tag.kept if kept.twin is not None):
                progress.wait(kept.tensor)
                assert torch.equal(kept.tensor.cpu(), kept.twin)
            progress.wait()
        except sire.CancelledError:
            assert cancelled
        except SHORT:
            pass

    def switch(self, name: str) -> None:
        coming, leaving = (name, "other") if name != "other" else (name, self.random.choice(NAMES[:2]))
        were = [tag for tag in self.under(leaving) if not tag.paused]
        try:
            sire.switch(pause=self.path(leaving), resume=self.path(coming))
        except SHORT:
            # Its message says how much of what had no backup is gone.
            for tag in were:
                tag.lose(certainly=False)
        else:
            assert all(tag.paused for tag in were)
            assert not any(tag.paused for tag in self.under(coming))
            for tag in were:
                tag.lose()

    def pre_copy(self, name: str) -> None:
        if all({"immutable", "verify"} & tag.policy.keys() for tag in self.under(name)):
            self.perhaps(lambda: sire.pre_copy(self.path(name)))

    def promote(self, name: str) -> None:
        self.perhaps(lambda: sire.promote(self.path(name)))

    def tidy(self, _name: str) -> None:
        self.random.choice((sire.trim, sire.empty_cache, torch.cuda.empty_cache, gc.collect))()

    def perhaps(self, call: Callable[[], object]) -> None:
        with suppress(*SHORT):
            call()

    def check(self) -> None:
        """What is resident is right."""
        for tag in self.tags.values():
            if not tag.paused:
                tag.check()

    def end(self) -> None:
        """Every tag comes back, with all that it had, as soon as the others have left it room."""
        away = list(self.tags.values())
        while away:
            came = [tag for tag in away if self.comes_back(tag)]
            assert came, f"never came back: {[tag.name for tag in away]}"
            away = [tag for tag in away if tag not in came]

    def comes_back(self, tag: Tag) -> bool:
        if tag.paused:
            self.perhaps(lambda: sire.resume(tag.name))
        if tag.paused:
            return False
        tag.check()
        tag.kept.clear()
        sire.empty_cache()
        return True


WHILE_RESIDENT = {
    World.allocate: 5,
    World.write: 4,
    World.pause: 4,
    World.free: 1,
    World.pre_copy: 1,
    World.resume: 1,
    World.tidy: 1,
}
WHILE_PAUSED = {
    World.resume: 4,
    World.resume_behind: 3,
    World.switch: 2,
    World.pause: 1,
    World.free: 1,
    World.promote: 1,
    World.refuse: 1,
    World.tidy: 1,
}
wanted = int(os.environ.get("SIRE_TEST_SEQUENCES", "0"))


@pytest.mark.parametrize("seed", [SystemRandom().randrange(1 << 32) for _ in range(wanted)] or range(1, 7))
def test_random_sequences(seed: int) -> None:
    world = World(seed)
    for _ in range(150):
        world.step()
    world.end()
