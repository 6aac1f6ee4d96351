"""Sizes, tags, errors and reports: values that need nothing but themselves."""

from __future__ import annotations

import sys
import types

import pytest
import sire
from sire import _hooks
from sire._errors import error_for
from sire._flags import flag
from sire._tags import encode_selection, encode_tag


@pytest.mark.parametrize(("text", "said"), [("", False), *((word, True) for word in ("1", "true", "Yes", "ON"))])
def test_switches_are_read_as_the_library_reads_them(text: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMS_RETAIN_CPU_BACKUP", text)
    assert flag("TMS_RETAIN_CPU_BACKUP") is sire.torch_memory_saver.TorchMemorySaver().retain_cpu_backup is said
    monkeypatch.setenv("SIRE_DISABLE", text)
    assert _hooks.switched_off() is said
    for no in ("0", "False", "no", "off"):
        monkeypatch.setenv("SIRE_DISABLE", no)
        assert not _hooks.switched_off()
    monkeypatch.delenv("SIRE_DISABLE")
    assert not _hooks.switched_off()
    monkeypatch.setenv("SIRE_DISABLE", "2")
    with pytest.raises(sire.InvalidArgumentError, match="SIRE_DISABLE is '2'; it must be 1 or 0"):
        _hooks.switched_off()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("6GiB", 6 << 30),
        ("512MiB", 512 << 20),
        ("64k", 64 << 10),
        ("1.5 GiB", 3 << 29),
        ("2g", 2 << 30),
        ("10MB", 10_000_000),
        (" 1 KiB ", 1024),
        ("12b", 12),
    ],
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert sire.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", -1, "1 e3", "6GiBB", "0x10", 1.5, None, True, "9" * 40, "１GiB", "nan"]
)
def test_sizes_are_never_guessed(text: object) -> None:
    with pytest.raises(sire.InvalidArgumentError):
        sire.parse_size(text)  # type: ignore[arg-type]


def test_sizes_are_written_for_people() -> None:
    assert sire.format_size(12) == "12 B"
    assert sire.format_size(6 << 30) == "6.00 GiB"
    assert sire.format_size(3 << 40) == "3.00 TiB"


@pytest.mark.parametrize("tag", ["a\0b", "x" * (1 << 20), "", 7, None, b"tag", "\ud800"])
def test_tags_that_c_could_not_carry_are_refused_shortly(tag: object) -> None:
    with pytest.raises(sire.InvalidArgumentError) as caught:
        encode_tag(tag)
    assert len(str(caught.value)) < 200


def test_tags_are_utf8_and_none_means_everything() -> None:
    assert encode_tag("modèle/poids") == "modèle/poids".encode()
    assert encode_selection(None) is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (1, sire.InvalidArgumentError),
        (2, sire.OutOfMemoryError),
        (3, sire.OutOfBackupSpaceError),
        (4, sire.UnknownTagError),
        (5, sire.UnknownAddressError),
        (6, sire.PausedError),
        (7, sire.BusyError),
        (8, sire.CapturingError),
        (9, sire.CancelledError),
        (10, sire.BackupIoError),
        (11, sire.NoDriverError),
        (12, sire.UnsupportedError),
        (13, sire.DeviceLostError),
        (14, sire.DriverError),
        (15, sire.InactiveError),
        (16, sire.VersionMismatchError),
        (17, sire.PausedAfterFailureError),
        (18, sire.InternalError),
        (99, sire.SireError),
    ],
)
def test_every_status_has_its_exception(status: int, kind: type[sire.SireError]) -> None:
    error = error_for(status, "the reason")
    assert type(error) is kind
    assert isinstance(error, sire.SireError)
    assert isinstance(error, RuntimeError)
    assert error.status == status
    assert str(error) == "the reason"


def test_out_of_memory_is_also_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sire import _errors

    class TheirError(RuntimeError):
        pass

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(OutOfMemoryError=TheirError))
    _errors._torch_out_of_memory_error.cache_clear()
    error = error_for(2, "too big")
    assert isinstance(error, TheirError)
    assert isinstance(error, sire.OutOfMemoryError)
    assert type(error).__name__ == "OutOfMemoryError"
    _errors._torch_out_of_memory_error.cache_clear()


def test_reports_say_when_nothing_happened() -> None:
    assert "already so" in str(sire.Report("pause", "a", regions_unchanged=1))
    empty = sire.Report("pause", "a", regions_changed=1)
    assert empty.changed
    assert empty.empty
    assert "no memory was allocated" in str(empty)
    full = sire.Report(
        "pause", None, regions_changed=1, allocations=2, bytes_expected=4 << 20, bytes_moved=4 << 20, bytes_discarded=5
    )
    assert "everything: 4.00 MiB of 4.00 MiB released" in str(full)
    assert "5 B discarded" in str(full)


def test_names_that_are_imported_late_are_those_of_their_packages() -> None:
    pytest.importorskip("torch", reason="the packages of models need PyTorch")
    import sire.models
    import sire.models.commits

    for late, package in ((sire._MODELS, sire.models), (sire._COMMITS, sire.models.commits)):
        assert late <= set(package.__all__)
        assert all(getattr(sire, name) is getattr(package, name) for name in late)
        for name in set(package.__all__) - late:
            own = getattr(sire, name, None)
            assert own is None or own is getattr(package, name) or name in sire.__all__, name
