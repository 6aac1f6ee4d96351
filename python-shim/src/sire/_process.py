"""Child processes that shall have the library preloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from . import _library
from ._errors import InvalidArgumentError
from ._regions import Backup, make_policy
from ._tags import encode_tag


def subprocess_environment(
    *, region: str | None = None, backup: Backup | None = None, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables that make a child process use the library in preload mode, for `subprocess` or Ray."""
    path = str(_library.library_path())
    if any(mark in path for mark in " :"):
        raise InvalidArgumentError(f"{path} cannot be preloaded: LD_PRELOAD separates its entries by spaces and colons")
    present = (os.environ if base is None else base).get("LD_PRELOAD", "")
    others = [entry for entry in present.replace(":", " ").split() if os.path.basename(entry) != _library.LIBRARY_NAME]
    variables = {
        "LD_PRELOAD": ":".join([path, *others]),
        "SIRE_HOOK_MODE": "preload",
        "SIRE_LIBRARY": path,
    }
    if region is not None:
        encode_tag(region)
        make_policy(backup, False, False)
        variables |= {"SIRE_REGION": region, "SIRE_BACKUP": backup or "none"}
    return variables


@contextmanager
def configure_subprocess(*, region: str | None = None, backup: Backup | None = None) -> Iterator[None]:
    """Processes that are started inside have the library preloaded.

    Sets LD_PRELOAD, SIRE_HOOK_MODE and SIRE_LIBRARY in this process's environment and restores them; it is for one
    thread at a time. ``region`` gives the child a process-wide region.
    """
    with _changed_environment(subprocess_environment(region=region, backup=backup)):
        yield


@contextmanager
def _changed_environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
