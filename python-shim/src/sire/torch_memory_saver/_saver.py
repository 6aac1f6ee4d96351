"""The object `torch_memory_saver`: that package's verbs, carried out by Sire.

Where its behaviour and Sire's differ, programs written for it must keep working: a pause or resume of a tag that
nobody used is not an error here, and an empty tag means everything.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import sire

from .. import _library
from .._errors import InvalidArgumentError, UnknownAddressError, UnknownTagError, UnsupportedError
from .._flags import flag

CpuBackupBackend = Literal["mmap", "pinned"]


@dataclass(eq=False)
class _Custom:
    factory: Callable[[], Any]
    uses_preload: bool


_custom_modes: dict[str, _Custom] = {}


def register_hook_mode(name: str, factory: Callable[[], Any], *, uses_preload: bool = True) -> None:
    """Adds a hook mode whose implementation ``factory()`` makes at first use; a later one of that name takes its place.

    The implementation has `region`, `cuda_graph`, `pause` and `resume`, and any other method that is called. It gets
    ``enable_disk_backup`` and ``cpu_backup_backend`` where they are set, and may do without: then they are refused.
    """
    if name in ("preload", "driver", "torch"):
        raise InvalidArgumentError(f"{name!r} is a built-in hook mode")
    _custom_modes[name] = _Custom(factory, uses_preload)


class TorchMemorySaver:
    """Regions, pause and resume in the words of the package torch_memory_saver."""

    def __init__(self) -> None:
        self._custom_name: str | None = None
        self._implementations: dict[_Custom, Any] = {}
        self._retain: bool | None = None

    # --- regions ----------------------------------------------------------------------------------------

    def region(
        self,
        tag: str = "default",
        enable_cpu_backup: bool = False,
        enable_disk_backup: bool = False,
        cpu_backup_backend: CpuBackupBackend | None = None,
    ) -> AbstractContextManager[Any]:
        """Tensors created inside can be paused; with a backup their content is kept.

        ``cpu_backup_backend`` says what kind of host memory that is: ``"pinned"`` (where the driver allows) or
        ``"mmap"``, pageable memory. By default it is what ``TMS_INIT_CPU_BACKUP_BACKEND`` says, else pinned.
        """
        if (custom := self._implementation()) is not None:
            more = {"enable_disk_backup": enable_disk_backup, "cpu_backup_backend": cpu_backup_backend}
            more = self._passed_on(custom.region, more)
            return _context(custom.region(tag=tag, enable_cpu_backup=enable_cpu_backup, **more))
        backup = _backup(enable_cpu_backup, enable_disk_backup, cpu_backup_backend)
        pageable = _is_pageable(backup, cpu_backup_backend)
        return sire.region(tag, backup=backup, retain=self.retain_cpu_backup, pageable=pageable)

    @contextmanager
    def cuda_graph(
        self,
        cuda_graph: Any,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "global",
        tag: str = "default",
        enable_cpu_backup: bool = False,
        cpu_backup_backend: CpuBackupBackend | None = None,
    ) -> Iterator[None]:
        """Like `torch.cuda.graph`, with the memory of the capture pausable, in both hook modes."""
        if (custom := self._implementation()) is not None:
            with custom.cuda_graph(
                cuda_graph=cuda_graph,
                pool=pool,
                stream=stream,
                capture_error_mode=capture_error_mode,
                tag=tag,
                enable_cpu_backup=enable_cpu_backup,
                **self._passed_on(custom.cuda_graph, {"cpu_backup_backend": cpu_backup_backend}),
            ):
                yield
            return
        backup = _backup(enable_cpu_backup, False, cpu_backup_backend)
        with sire.cuda_graph(
            cuda_graph,
            tag=tag,
            backup=backup,
            retain=self.retain_cpu_backup,
            pageable=_is_pageable(backup, cpu_backup_backend),
            pool=pool,
            stream=stream,
            capture_error_mode=capture_error_mode,
        ):
            yield

    def disable(self, dispose_mem_pool_after_use: bool = True) -> AbstractContextManager[None]:
        """What is created inside is not pausable, also within a region."""
        if not dispose_mem_pool_after_use:
            raise UnsupportedError("disable() always drops its pool at the end")
        if (custom := self._implementation()) is not None:
            return _context(custom.disable())
        return sire.disable()

    # --- pause and resume -------------------------------------------------------------------------------

    def pause(self, tag: str | None = None) -> None:
        """Releases the memory of a tag, or of all."""
        if (custom := self._implementation()) is not None:
            custom.pause(tag=tag)
            return
        try:
            sire.pause(tag or None)
        except UnknownTagError:
            pass

    def resume(self, tag: str | None = None) -> None:
        """Brings the memory of a tag back, or of all."""
        if (custom := self._implementation()) is not None:
            custom.resume(tag=tag)
            return
        try:
            sire.resume(tag or None)
        except UnknownTagError:
            pass

    # --- settings ---------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """True: always in service."""
        return True

    @property
    def hook_mode(self) -> str | None:
        """``"preload"``, ``"torch"`` or a registered one; found by itself unless set before the first use."""
        return self._custom_name or sire.hook_mode

    @hook_mode.setter
    def hook_mode(self, mode: str) -> None:
        if mode in _custom_modes:
            self._custom_name = mode
            return
        sire.hook_mode = mode  # type: ignore[assignment]  # judged there
        self._custom_name = None

    @property
    def memory_margin_bytes(self) -> int:
        """Device memory that stays free. Can only be set."""
        raise NotImplementedError("memory_margin_bytes can only be set")

    @memory_margin_bytes.setter
    def memory_margin_bytes(self, value: int) -> None:
        if (custom := self._implementation()) is not None:
            custom.memory_margin_bytes = value
            return
        sire.set_margin(value)

    @property
    def retain_cpu_backup(self) -> bool:
        """Whether regions opened from now on keep their backup's space for the next pause."""
        if self._retain is None:
            return flag("TMS_RETAIN_CPU_BACKUP")
        return self._retain

    @retain_cpu_backup.setter
    def retain_cpu_backup(self, value: bool) -> None:
        self._retain = bool(value)
        setter = getattr(_library.load().c, "tms_set_retain_cpu_backup", None)
        if setter is not None:
            setter(self._retain)

    def get_cpu_backup(self, x: Any, zero_copy: bool = False) -> Any | None:
        """The tensor's bytes in its host backup, as a CPU tensor; None if there is none."""
        if (custom := self._implementation()) is not None:
            return custom.get_cpu_backup(x, zero_copy=zero_copy)
        try:
            return sire.get_cpu_backup(x, zero_copy=zero_copy)
        except UnknownAddressError:
            return None

    def set_disk_backup_dir(self, path: str) -> None:
        """The directory of disk backups, created if it is not there."""
        os.makedirs(path, exist_ok=True)
        sire.set_disk_directory(path)

    def keep_resident(self, x: Any) -> int:
        """The allocation that holds the tensor stays on the device at every pause, until it is freed.

        Returns its bytes; 0 for an empty tensor or one outside of regions. An error while the tensor is paused.
        """
        if (custom := self._implementation()) is not None:
            kept: int = custom.keep_resident(x)
            return kept
        return sire.keep_resident(x)

    def _implementation(self) -> Any | None:
        """The custom hook mode's object; None for Sire itself."""
        if self._custom_name is None:
            return None
        mode = _custom_modes[self._custom_name]
        if mode not in self._implementations:
            self._implementations[mode] = mode.factory()
        return self._implementations[mode]

    def _passed_on(self, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        """Those that are set; raises if the custom hook mode's function does not take one of them."""
        given = {name: value for name, value in arguments.items() if value}
        for name in given:
            if not _takes(function, name):
                raise UnsupportedError(
                    f"the hook mode {self._custom_name!r} takes no {name}, so its memory would be without that. Leave "
                    "it out, or use one of Sire's hook modes."
                )
        return given


def _backup(cpu: bool, disk: bool, backend: object) -> Literal["cpu", "disk"] | None:
    if cpu and disk:
        raise InvalidArgumentError("enable_cpu_backup and enable_disk_backup exclude each other")
    if backend is not None and not cpu:
        raise InvalidArgumentError("cpu_backup_backend needs enable_cpu_backup=True")
    if backend not in (None, "mmap", "pinned"):
        raise InvalidArgumentError(f"cpu_backup_backend is 'mmap' or 'pinned', not {backend!r}")
    return "cpu" if cpu else "disk" if disk else None


def _is_pageable(backup: str | None, backend: object) -> bool:
    """Whether host memory for the backup is not to be pinned."""
    if backup != "cpu":
        return False
    wanted = backend or os.environ.get("TMS_INIT_CPU_BACKUP_BACKEND") or "pinned"
    if wanted not in ("mmap", "pinned"):
        raise InvalidArgumentError(f"TMS_INIT_CPU_BACKUP_BACKEND is 'mmap' or 'pinned', not {wanted!r}")
    return wanted == "mmap"


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether it can be called with an argument of this name; a function that does not tell is believed to."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    any_name = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return any_name or (name in parameters and parameters[name].kind in named)


def _context(manager: Any) -> AbstractContextManager[Any]:
    found: AbstractContextManager[Any] = manager
    return found


torch_memory_saver = TorchMemorySaver()
"""The one object that programs use."""
