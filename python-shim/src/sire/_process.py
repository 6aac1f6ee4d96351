"""Child processes that shall have the library preloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from . import _hooks, _library
from ._errors import InvalidArgumentError
from ._regions import Backup, make_policy
from ._tags import encode_tag

_OURS = (_library.LIBRARY_NAME, _library.DRIVER_LIBRARY_NAME)

PreloadMode = Literal["preload", "driver"]


def subprocess_environment(
    *,
    region: str | None = None,
    backup: Backup | None = None,
    base: Mapping[str, str] | None = None,
    hook_mode: PreloadMode | None = None,
) -> dict[str, str]:
    """The variables that make a child process use the library by LD_PRELOAD, for `subprocess` or Ray.

    ``hook_mode`` is ``"preload"`` or ``"driver"``; left out, it is this process's if that is one of the two, else
    ``"preload"``.
    """
    mode = _preload_mode(hook_mode)
    paths = [str(_library.library_path())]
    if mode == "driver":
        paths.insert(0, str(_library.driver_library_path()))
    for path in paths:
        if any(mark in path for mark in " :"):
            raise InvalidArgumentError(
                f"{path} cannot be preloaded: LD_PRELOAD separates its entries by spaces and colons"
            )
    present = (os.environ if base is None else base).get("LD_PRELOAD", "")
    others = [entry for entry in present.replace(":", " ").split() if os.path.basename(entry) not in _OURS]
    variables = {
        "LD_PRELOAD": ":".join([*paths, *others]),
        "SIRE_HOOK_MODE": mode,
        "SIRE_LIBRARY": paths[-1],
    }
    if region is not None:
        encode_tag(region)
        make_policy(backup, False, False)
        variables |= {"SIRE_REGION": region, "SIRE_BACKUP": backup or "none"}
    return variables


def _preload_mode(wanted: object) -> PreloadMode:
    if wanted is None:
        return "driver" if _hooks.known_hook_mode() == "driver" else "preload"
    if wanted not in ("preload", "driver"):
        raise InvalidArgumentError(f"hook_mode of a child process is 'preload' or 'driver', not {wanted!r}")
    return wanted


@contextmanager
def configure_subprocess(
    *, region: str | None = None, backup: Backup | None = None, hook_mode: PreloadMode | None = None
) -> Iterator[None]:
    """Processes that are started inside have the library preloaded.

    Sets LD_PRELOAD, SIRE_HOOK_MODE and SIRE_LIBRARY in this process's environment and restores them; it is for one
    thread at a time. ``region`` gives the child a process-wide region; ``hook_mode`` as in `subprocess_environment`.
    """
    with _changed_environment(subprocess_environment(region=region, backup=backup, hook_mode=hook_mode)):
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
