"""Which hook mode a process gets, and the refusals where the chosen one cannot work."""

from __future__ import annotations

import pytest
import sire

from fake_library import FakeLibrary


def _use() -> str | None:
    with sire.region("a"):
        pass
    return sire.hook_mode


def test_the_mode_is_found_by_itself(library: FakeLibrary) -> None:
    assert sire.hook_mode is None
    assert _use() == "torch"


def test_a_live_hook_means_preload(library: FakeLibrary) -> None:
    library.live = True
    assert _use() == "preload"


def test_live_driver_hooks_mean_driver(library: FakeLibrary) -> None:
    library.live = library.driver_live = True
    assert _use() == "driver"


def test_preload_stays_preload_beside_driver_hooks(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    library.live = library.driver_live = True
    monkeypatch.setenv("SIRE_HOOK_MODE", "preload")
    assert _use() == "preload"


def test_driver_without_its_library_is_refused(library: FakeLibrary) -> None:
    sire.hook_mode = "driver"
    with pytest.raises(sire.InactiveError, match="hook mode 'driver' was chosen, but this process's cudaMalloc"):
        _use()
    library.live = True
    with pytest.raises(sire.InactiveError, match=r"libsire_driver\.so was not preloaded, or another library hooks"):
        _use()
    library.driver_live = True
    assert _use() == "driver"


@pytest.mark.parametrize("variable", ["SIRE_HOOK_MODE", "TMS_HOOK_MODE"])
def test_the_environment_chooses(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    library.live = True
    monkeypatch.setenv(variable, "torch")
    assert _use() == "torch"


def test_the_environment_is_judged(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIRE_HOOK_MODE", "magic")
    with pytest.raises(sire.InvalidArgumentError, match="SIRE_HOOK_MODE"):
        _use()


def test_assignment_wins_and_is_judged(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIRE_HOOK_MODE", "preload")
    with pytest.raises(sire.InvalidArgumentError):
        sire.hook_mode = "magic"  # type: ignore[assignment]
    sire.hook_mode = "torch"
    assert _use() == "torch"


def test_the_mode_is_fixed_by_its_first_use(library: FakeLibrary) -> None:
    _use()
    sire.hook_mode = "torch"
    with pytest.raises(sire.InvalidArgumentError, match="in use"):
        sire.hook_mode = "preload"


def test_preload_without_a_live_hook_is_refused(library: FakeLibrary) -> None:
    sire.hook_mode = "preload"
    with pytest.raises(sire.InactiveError, match="was not preloaded"):
        _use()
    with pytest.raises(sire.InactiveError):
        sire.pause()


def test_a_preload_that_vanished_is_refused(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/gone/libsire_alloc.so")
    with pytest.raises(sire.InactiveError, match=r"/gone/libsire_alloc\.so does not exist"):
        _use()
    sire.hook_mode = "torch"
    assert _use() == "torch"


def test_a_mode_that_does_not_exist_is_refused_by_name(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "is 'preload', 'driver', 'torch' or 'allocator', not 'sideways'"
    with pytest.raises(sire.InvalidArgumentError, match=f"hook_mode {names}"):
        sire.hook_mode = "sideways"
    monkeypatch.setenv("SIRE_HOOK_MODE", "sideways")
    with pytest.raises(sire.InvalidArgumentError, match=f"SIRE_HOOK_MODE {names}"):
        _use()
