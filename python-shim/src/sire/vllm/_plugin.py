"""How vLLM comes to use Sire: the backend's name in vLLM's registry, and the function that gives vLLM its allocator.

A plugin is called in every process of vLLM wherever this package is installed, so that without ``SIRE_VLLM=1`` it
changes nothing but the list of backends. The environment, and not vLLM's configuration, decides: the configuration
is not known everywhere where vLLM allocates, and half a model in regions would be worse than none.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from types import ModuleType
from typing import Any

from .._errors import InvalidArgumentError, UnsupportedError
from ._allocator import SireAllocator

BACKEND = "sire"
"""The name for ``--sleep-mode-backend``."""

_GIVER = "get_mem_allocator_instance"
_log = logging.getLogger("sire.vllm")


def register() -> None:
    """Makes the backend ``sire`` known to vLLM and, with ``SIRE_VLLM=1``, gives vLLM its allocator; repeatable.

    `UnsupportedError` without vLLM, or if ``SIRE_VLLM=1`` asks for what this vLLM has no place for; unasked, that is
    a warning in the log. A vLLM that has no pluggable backends yet is served through the allocator alone.
    """
    require()
    if _is_wanted():
        _register_backend()
        _route()
        return
    try:
        _register_backend()
    except UnsupportedError as error:  # nobody asked for Sire, so vLLM goes on without
        _log.warning("vLLM does not get the sleep-mode backend %r: %s", BACKEND, error)


def require() -> None:
    """`UnsupportedError` if vLLM cannot be imported."""
    if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
        raise UnsupportedError("sire.vllm serves vLLM, which is not installed in this environment: pip install vllm")


def is_routed() -> bool:
    """Whether vLLM gets Sire's allocator."""
    package = sys.modules.get("vllm.device_allocator")
    theirs = getattr(sys.modules.get("vllm.device_allocator.cumem"), "CuMemAllocator", None)
    giver = getattr(package, _GIVER, None) or getattr(theirs, "get_instance", None)
    return giver is SireAllocator.get_instance


def _is_wanted() -> bool:
    value = os.environ.get("SIRE_VLLM", "")
    if value not in ("", "0", "1"):
        raise InvalidArgumentError(f"SIRE_VLLM is 1 (vLLM allocates through Sire), 0 or unset, not {value!r}")
    return value == "1"


def _register_backend() -> None:
    module = _imported("vllm.device_allocator.sleep_mode_backend")
    factory = getattr(module, "SleepModeBackendFactory", None)
    if factory is None or _is_registered(factory):
        return
    factory.register_backend(BACKEND, __package__, "SireBackend")


def _is_registered(factory: Any) -> bool:
    try:
        known = factory.get_backend_class(BACKEND)
    except ValueError:
        return False
    if known.__module__.startswith(f"{__package__}."):
        return True
    raise UnsupportedError(f"another plugin has given vLLM a sleep-mode backend named {BACKEND!r}: {known!r}")


def _route() -> None:
    """vLLM's worker asks one function for its allocator; before there was that, one class."""
    package = _imported("vllm.device_allocator")
    original = getattr(package, _GIVER, None)
    if original is not None:
        _replace_everywhere(original)
        return
    theirs = getattr(_imported("vllm.device_allocator.cumem"), "CuMemAllocator", None)
    if theirs is None:
        raise UnsupportedError(
            "SIRE_VLLM=1, but this vLLM has neither vllm.device_allocator.get_mem_allocator_instance nor "
            "vllm.device_allocator.cumem.CuMemAllocator, through which it could be given an allocator"
        )
    theirs.get_instance = staticmethod(SireAllocator.get_instance)


def _replace_everywhere(original: Any) -> None:
    """In vLLM's own modules too, which import the function by name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "vllm" and module.__dict__.get(_GIVER) is original:
            setattr(module, _GIVER, SireAllocator.get_instance)


def _imported(name: str) -> ModuleType | None:
    """The module; None if this vLLM does not have it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name is not None and name.startswith(error.name):
            return None
        raise UnsupportedError(f"{name} of the installed vLLM cannot be imported: {error}") from error
