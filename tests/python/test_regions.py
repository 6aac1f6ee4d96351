"""Regions, pause and resume against the stand-in library: what nests, what is refused, what is restored."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import sire

from fake_library import FakeLibrary


def test_a_region_is_open_inside_and_closed_outside(library: FakeLibrary) -> None:
    with sire.region("a") as region:
        assert library.tags_inside() == ["a"]
        assert region.tag == "a"
        assert not region.paused
    assert library.tags_inside() == []


def test_regions_nest_in_each_other_and_in_themselves(library: FakeLibrary) -> None:
    outer, inner = sire.region("a"), sire.region("b", backup="cpu")
    with outer, inner, outer, outer:
        assert library.tags_inside() == ["a", "b", "a", "a"]
    assert library.tags_inside() == []
    with outer:
        assert library.tags_inside() == ["a"]


def test_a_region_is_closed_when_its_body_raises(library: FakeLibrary) -> None:
    with pytest.raises(ZeroDivisionError), sire.region("a"), sire.region("b"):
        raise ZeroDivisionError
    assert library.tags_inside() == []


def test_a_region_decorates_functions(library: FakeLibrary) -> None:
    @sire.region("a")
    def depth(n: int) -> list[str]:
        return library.tags_inside() if n == 0 else depth(n - 1)

    assert depth(2) == ["a", "a", "a"]
    assert depth.__name__ == "depth"
    assert library.tags_inside() == []


def test_what_runs_after_its_call_cannot_be_decorated(library: FakeLibrary) -> None:
    async def coroutine() -> None: ...

    def generator() -> object:
        yield 1

    for function in (coroutine, generator):
        with pytest.raises(TypeError, match="runs after its call returns"):
            sire.region("a")(function)


def test_each_thread_has_its_own_regions(library: FakeLibrary) -> None:
    region = sire.region("a")
    seen: list[list[str]] = []
    with region:
        thread = threading.Thread(target=lambda: seen.append(library.tags_inside()))
        thread.start()
        thread.join()
    assert seen == [[]]


def test_leaving_in_another_thread_is_refused(library: FakeLibrary) -> None:
    region = sire.region("a")
    region.__enter__()
    errors: list[BaseException] = []

    def leave() -> None:
        try:
            region.__exit__(None, None, None)
        except sire.InvalidArgumentError as error:
            errors.append(error)

    thread = threading.Thread(target=leave, name="stranger")
    thread.start()
    thread.join()
    assert "stranger" in str(errors[0])
    assert library.tags_inside() == ["a"]
    region.__exit__(None, None, None)


def test_policies_are_told_to_the_library(library: FakeLibrary) -> None:
    with sire.region("a", backup="disk", zero_fill=True, retain=True):
        pass
    for settings in ({"immutable": True}, {"verify": "hash"}, {"verify": "bytes", "immutable": True}):
        with sire.region("b", backup="cpu", **settings):
            pass
    with sire.region("c", whole=True):
        pass
    assert library.regions == [
        ("a", 2, True, True, 0, False, False),
        ("b", 1, False, False, 1, False, False),
        ("b", 1, False, False, 2, False, False),
        ("b", 1, False, False, 3, False, False),
        ("c", 0, False, False, 0, False, True),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sire.region(7),
        lambda: sire.region("a\0b"),
        lambda: sire.region("a", backup="tape"),
        lambda: sire.region("a", backup=1),
        lambda: sire.region("a", immutable=True),
        lambda: sire.region("a", backup="cpu", verify="trust"),
        lambda: sire.region("a", on_paused="explode"),
        lambda: sire.pause("a\0b"),
        lambda: sire.pause("x" * (1 << 20)),
        lambda: sire.resume("a\0b"),
        lambda: sire.resume(wait=-1),
        lambda: sire.resume(wait=float("nan")),
        lambda: sire.resume(wait="long"),
        lambda: sire.keep(object()),
        lambda: sire.set_margin("lots"),
    ],
)
def test_bad_arguments_are_refused_before_anything_happens(library: FakeLibrary, wrong: Callable[[], object]) -> None:
    with pytest.raises(sire.InvalidArgumentError):
        wrong()
    assert library.calls == []
    assert library.regions == []


def test_two_tags_change_places(library: FakeLibrary) -> None:
    for tag in ("a", "a/b", "c"):
        with sire.region(tag, backup="cpu"):
            pass
    sire.pause("c")
    paused, resumed = sire.switch(pause="a", resume="c")
    assert (paused.action, paused.tag, paused.regions_changed) == ("pause", "a", 2)
    assert (resumed.action, resumed.tag, resumed.regions_changed) == ("resume", "c", 1)
    with pytest.raises(sire.InvalidArgumentError, match="to be paused and to be resumed"):
        sire.switch(pause="a", resume="a/b")
    with pytest.raises(sire.UnknownTagError):
        sire.switch(pause="c", resume="nobody")


def test_memory_that_stays_until_somebody_needs_it(library: FakeLibrary) -> None:
    with sire.region("a", backup="cpu"):
        pass
    assert sire.pause("a", release="lazy").changed
    assert library.settings["lazy"] is True
    sire.pause("a")
    assert library.settings["lazy"] is False
    with pytest.raises(sire.InvalidArgumentError, match="lazy"):
        sire.pause("a", release="later")  # type: ignore[arg-type]


def test_backups_ahead_of_a_pause(library: FakeLibrary) -> None:
    with sire.region("a", backup="cpu", immutable=True), sire.region("b", backup="cpu"):
        pass
    report = sire.pre_copy("a")
    assert (report.action, report.tag, report.regions_changed) == ("pre_copy", "a", 1)
    assert "nothing moved" in str(report)
    with pytest.raises(sire.InvalidArgumentError, match="pre-copy"):
        sire.pre_copy("b")
    with pytest.raises(sire.UnknownTagError):
        sire.pre_copy("nobody")
    with pytest.raises(sire.InvalidArgumentError):
        sire.pre_copy("")
    sire.pause("a")
    assert sire.pre_copy("a").regions_unchanged == 1


def test_pause_and_resume_by_hierarchical_tag(library: FakeLibrary) -> None:
    for tag in ("model/weights", "model/cache", "modelling"):
        with sire.region(tag):
            pass
    report = sire.pause("model")
    assert (report.action, report.tag, report.regions_changed) == ("pause", "model", 2)
    again = sire.pause("model")
    assert not again.changed
    assert again.regions_unchanged == 2
    assert sire.pause().regions_changed == 1
    assert sire.resume("model/cache").regions_changed == 1
    assert sire.resume().regions_changed == 2
    assert sire.resume(wait=2).changed is False
    assert library.settings["wait"] == 2.0


def test_unknown_tags_are_errors(library: FakeLibrary) -> None:
    for call in (sire.pause, sire.resume):
        with pytest.raises(sire.UnknownTagError, match="nobody"):
            call("nobody")


def test_entering_a_paused_region_is_refused_or_resumes(library: FakeLibrary) -> None:
    with sire.region("a"):
        pass
    sire.pause("a")
    with pytest.raises(sire.PausedError), sire.region("a"):
        pytest.fail("entered")
    assert library.tags_inside() == []
    with sire.region("a", on_paused="resume") as region:
        assert not region.paused


def test_pausing_from_inside_is_refused(library: FakeLibrary) -> None:
    with sire.region("a"), pytest.raises(sire.BusyError):
        sire.pause("a")
    assert sire.pause("a").changed


def test_paused_resumes_also_when_the_body_raises(library: FakeLibrary) -> None:
    with sire.region("a"):
        pass
    with pytest.raises(ZeroDivisionError), sire.paused("a") as report:
        assert report.changed
        assert library.paused == {0}
        raise ZeroDivisionError
    assert library.paused == set()


def test_disable_suspends_the_thread(library: FakeLibrary) -> None:
    thread = threading.get_ident()
    with sire.region("a"):
        with pytest.raises(ZeroDivisionError), sire.disable():
            assert library.suspended[thread] == 1
            raise ZeroDivisionError
        assert library.suspended[thread] == 0


def test_settings_reach_the_library(library: FakeLibrary) -> None:
    sire.set_margin("1GiB")
    sire.set_disk_directory("/some/where")
    assert library.settings == {"margin": 1 << 30, "disk": b"/some/where"}
    assert sire.trim() == (3, 4)
    assert sire.trim().host_bytes == 4
    assert sire.stats() == {"regions": []}
