"""Devices are introduced to each other once; what goes wrong there keeps no region from beginning."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import sire
from sire import _hooks, _library, _peers

Pair = tuple[int, int]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """What the library is asked for; device 2 is refused."""
    pairs: list[Pair] = []

    def allow_peer(owner: int, accessor: int) -> None:
        pairs.append((owner, accessor))
        if 2 in (owner, accessor):
            raise sire.DriverError("the driver refuses")

    monkeypatch.setattr(_peers, "_introduced", set())
    monkeypatch.setattr(_hooks, "preloaded", lambda: False)
    monkeypatch.setattr(_library, "load", lambda: SimpleNamespace(allow_peer=allow_peer))
    return pairs


def torch_with(used: set[int]) -> SimpleNamespace:
    """As much of PyTorch as is asked: four devices, these in use; device 3 has no way to the others."""
    linked = lambda accessor, owner: 3 not in (accessor, owner)  # noqa: E731
    return SimpleNamespace(
        cuda=SimpleNamespace(device_count=lambda: 4, can_device_access_peer=linked),
        _C=SimpleNamespace(_cuda_hasPrimaryContext=used.__contains__),
    )


def test_each_pair_is_introduced_once(asked: list[Pair]) -> None:
    used = {0}
    for device in (0, 1, 0, 1):
        _peers.introduce(torch_with(used), device)
        used.add(device)
    assert asked == [(0, 1), (1, 0)]


@pytest.mark.parametrize(("device", "why"), [(2, "the driver refuses"), (3, "no peer access")])
def test_what_cannot_be_is_a_warning_once_also_where_warnings_are_errors(
    asked: list[Pair], device: int, why: str
) -> None:
    torch = torch_with({0, 1, device})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=why):
            _peers.introduce(torch, device)
        _peers.introduce(torch, device)
        _peers.introduce(torch, 0)
    # Those that can reach each other do.
    assert {(0, 1), (1, 0)} <= set(asked)
    assert len(asked) == len(set(asked))


def test_every_way_is_named(asked: list[Pair]) -> None:
    with pytest.warns(RuntimeWarning, match="cannot reach memory") as said:
        _peers.introduce(torch_with({0, 1, 2, 3}), 0)
    assert len(said) == 10, "all pairs but 0 and 1, both ways"
    assert len(asked) == 6
