"""What a figure is: a median with its spread, the ceiling or the peer that was measured beside it in the same run, and a verdict.

A ratio is taken per repetition, from two times measured one right after the other, and then the median of those is shown, so that
a machine that is slower in one minute than in the next changes both sides alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

GIB = 1 << 30
MIB = 1 << 20
# A ceiling whose own fastest and slowest repetition differ by more than this says nothing about what is below it.
STEADY = 1.5
PASSED = 1.25


class Unmeasurable(Exception):
    """A figure that this machine or this call cannot give, and why."""


class Wrong(Exception):
    """Something that was measured did not do its job: wrong bytes, or a program that failed. No figure may come of it."""


# So likely may a miss be by chance alone.
CHANCE = 0.05


def spread(values: Sequence[float]) -> float:
    """How many times the least of them the largest is. Of ten and more, a tenth at either end does not count."""
    outer = len(values) // 10
    inner = sorted(values)[outer : len(values) - outer]
    return inner[-1] / inner[0] if inner[0] > 0 else math.inf


def so_few_by_chance(few: int, of: int) -> float:
    """How likely at most so `few` heads are in so many throws of a coin."""
    return math.ldexp(sum(math.comb(of, each) for each in range(few + 1)), -of)


@dataclass(frozen=True)
class Target:
    """What a figure must reach: a number and the side on which it has to be."""

    of: str  # "ratio", "value" or "max"
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        bound = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        return f"{self.of} {bound}"

    def met_by(self, figure: Figure) -> bool:
        number = {"ratio": figure.ratio, "value": figure.value, "max": figure.max}[self.of]
        return number is not None and self.reached_by(number)

    def reached_by(self, number: float) -> bool:
        return (self.at_least is None or number >= self.at_least) and (self.at_most is None or number <= self.at_most)


@dataclass
class Figure:
    """One line of the table."""

    name: str
    unit: str
    values: Sequence[float]
    ceilings: Sequence[float] | None = None
    # Per repetition; `values / ceilings` unless the figure is one where less is better.
    ratios: Sequence[float] | None = None
    target: Target | None = None
    # Why the figure must not be judged, or what a reader should know.
    meaningless: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # The device of a figure whose times are a model's; nothing for figures that were measured.
    simulated_on: str = ""

    def __post_init__(self) -> None:
        if not self.values:
            raise Wrong(f"{self.name}: nothing was measured")
        if self.ratios is None and self.ceilings is not None:
            self.ratios = [value / ceiling for value, ceiling in zip(self.values, self.ceilings, strict=True)]

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; `None` where there is none, or where judging would mean nothing."""
        return None if self.target is None or self.meaningless else self.target.met_by(self)

    def doubt(self, ceilings: Sequence[float], what: str, limit: float = STEADY) -> None:
        """Not to be judged if the ceiling itself was not steady."""
        if spread(ceilings) > limit:
            self.meaningless.append(f"{what} itself varied by {spread(ceilings):.1f}x in this run")

    def tell_tie(self, what: str = "pairs") -> None:
        """Not to be judged where the median misses the target, but so many of what was compared reach it that a coin might have decided: the sign test."""
        target = self.target
        if target is None or target.of != "ratio" or self.met is not False:
            return
        reach, pairs = sum(map(target.reached_by, self.ratios or [])), len(self.ratios or [])
        if so_few_by_chance(0, pairs) > CHANCE:
            self.meaningless.append(f"{pairs} {what} are too few to tell")
        elif so_few_by_chance(reach, pairs) > CHANCE:
            self.meaningless.append(f"a tie: {reach} of {pairs} {what} reach it")

    def stay_below(self, what: str) -> None:
        """Not to be judged if it passes its ceiling by more than noise: then that was no ceiling."""
        if self.ratio is not None and self.ratio > PASSED:
            self.meaningless.append(f"faster than {what}, so something else slowed that down")

    def tell_limit(self, limits: Sequence[float], what: str) -> None:
        """Says so of a miss where the target is more than `what` itself reaches, which is `limits`. The target stays what it is."""
        limit, target = median(limits), self.target
        if target is not None and limit < (target.at_least or 0) and not target.met_by(self):
            self.notes.append(f"out of reach here: {what} is itself only {limit:.3g} times as fast")

    def as_json(self, device: str) -> dict[str, object]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "ceiling": median(self.ceilings) if self.ceilings else None,
            "ratio": self.ratio,
            "samples": len(self.values),
            "simulated": bool(self.simulated_on),
            "device": self.simulated_on or device,
            "min": self.min,
            "max": self.max,
            "ratio_min": min(self.ratios) if self.ratios else None,
            "ratio_max": max(self.ratios) if self.ratios else None,
            "target": str(self.target) if self.target else None,
            "met": self.met,
            "meaningless": self.meaningless,
            "notes": self.notes,
        }


def rates(seconds: Sequence[float], amount: int) -> list[float]:
    """GiB per second."""
    return [amount / GIB / each for each in seconds]


def ways(count: int) -> list[bool]:
    """ABBA: which of `count` repetitions start with the other side."""
    return [number % 4 in (1, 2) for number in range(count)]
