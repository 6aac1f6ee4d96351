"""How allocations reach the library in this process, and what makes that impossible.

Four modes. ``preload``: the library was loaded by LD_PRELOAD, and the program's own cudaMalloc arrives in it.
``driver``: so was libsire_driver.so, and what libraries ask the driver for arrives as well (docs/driver-hooks.md).
``torch``: PyTorch is told, per region, to allocate through the library's functions. ``allocator``: the library is
PyTorch's allocator for everything (`sire.use_allocator`). The mode is decided once, at first use: what was set, else
SIRE_HOOK_MODE, else TMS_HOOK_MODE, else what is live.
"""

from __future__ import annotations

import os
import threading
from typing import Literal, cast

from . import _library
from ._errors import InactiveError, InvalidArgumentError
from ._flags import flag

HookMode = Literal["preload", "driver", "torch", "allocator"]

_MODES = ("preload", "driver", "torch", "allocator")
_wanted: HookMode | None = None
_decided: HookMode | None = None
_deciding = threading.Lock()


def hook_mode() -> HookMode:
    """The mode of this process; decides it at the first call."""
    global _decided
    if _decided is None:
        with _deciding:
            if _decided is None:
                _decided = _decide()
    return _decided


def known_hook_mode() -> HookMode | None:
    """The mode if it is decided or was set; None while it is still to be found."""
    return _decided or _wanted


def set_hook_mode(mode: object) -> None:
    """Chooses the mode; possible until the first use."""
    global _wanted
    wanted = _mode(mode, "hook_mode")
    with _deciding:
        if _decided is not None and _decided != wanted:
            raise InvalidArgumentError(
                f"hook_mode is {_decided!r} and in use; set it before the first region, pause or resume"
            )
        _wanted = wanted


def _mode(mode: object, source: str) -> HookMode:
    if mode not in _MODES:
        raise InvalidArgumentError(f"{source} is 'preload', 'driver', 'torch' or 'allocator', not {mode!r}")
    return cast(HookMode, mode)


def _decide() -> HookMode:
    wanted = _wanted or _wanted_by_environment()
    if wanted in ("torch", "allocator"):
        return wanted
    if _library.load().hook_live():
        return _level(wanted)
    if wanted in ("preload", "driver"):
        raise InactiveError(
            f"the hook mode {wanted!r} was chosen, but this process's cudaMalloc does not reach Sire: "
            f"{_why_not_live()} Start it as LD_PRELOAD=$(sire path) python ..., or inside "
            "sire.configure_subprocess(), or choose sire.hook_mode = 'torch'."
        )
    if _preload_entries():
        raise InactiveError(
            "LD_PRELOAD names Sire's library, but this process's cudaMalloc does not reach it: "
            f"{_why_not_live()} Preload $(sire path), or choose sire.hook_mode = 'torch'."
        )
    return "torch"


def _level(wanted: HookMode | None) -> HookMode:
    """Whether the driver's functions are hooked, too."""
    if wanted == "preload":
        return "preload"
    if _library.load().driver_hook_live():
        return "driver"
    if wanted == "driver":
        raise InactiveError(
            "the hook mode 'driver' was chosen, but look-ups of the driver's functions do not reach Sire: "
            f"{_library.DRIVER_LIBRARY_NAME} was not preloaded, or another library hooks dlsym first. Start it with "
            'sire run --hook-mode driver, or as LD_PRELOAD="$(sire path --driver) $(sire path)" python ...'
        )
    return "preload"


def _wanted_by_environment() -> HookMode | None:
    for name in ("SIRE_HOOK_MODE", "TMS_HOOK_MODE"):
        value = os.environ.get(name)
        if value:
            return _mode(value, name)
    return None


def _preload_entries() -> list[str]:
    entries = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return [entry for entry in entries if os.path.basename(entry) == _library.LIBRARY_NAME]


def _why_not_live() -> str:
    entries = _preload_entries()
    if not entries:
        return "the library was not preloaded."
    gone = [entry for entry in entries if not os.path.exists(entry)]
    if gone:
        return f"{gone[0]} does not exist."
    return f"{entries[0]} was named after the process started, or another library hooks cudaMalloc first."


def preloaded() -> bool:
    """Whether PyTorch's own cudaMalloc is hooked in this process's mode."""
    return hook_mode() in ("preload", "driver")


def switched_off() -> bool:
    """Whether SIRE_DISABLE=1 makes every hook pass through."""
    return flag("SIRE_DISABLE")
