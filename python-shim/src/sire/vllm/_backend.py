"""The backend of vLLM's ``--sleep-mode-backend sire``: levels, as the allocator's tags. Imported only where vLLM is."""

from __future__ import annotations

from collections.abc import Callable

from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

from .._errors import InvalidArgumentError, UnsupportedError
from ._allocator import SireAllocator
from ._plugin import is_routed

_KEPT: dict[object, tuple[str, ...]] = {1: ("weights",), 2: ()}


class SireBackend(SleepModeBackend):  # type: ignore[misc]  # vLLM's class is not seen by the type checker
    """Suspends and resumes what vLLM's worker allocated under its tags.

    ``state()`` is ``"SUSPENDED"`` as long as any tag sleeps, also after a failed or partial resume.
    """

    def __init__(self) -> None:
        super().__init__()
        if not is_routed():
            raise UnsupportedError(
                "the sleep-mode backend 'sire' was chosen, but vLLM's memory was not allocated through Sire: set "
                "SIRE_VLLM=1 in the environment of vLLM and of its workers, and start it again"
            )
        self._allocator = SireAllocator.get_instance()

    def suspend(self, level: int = 1) -> None:
        """Level 1 keeps the weights in host memory, level 2 nothing; both throw the KV cache away."""
        if level not in _KEPT:
            raise InvalidArgumentError(f"a sleep level is 1 or 2, not {level!r}")
        self._following(lambda: self._allocator.sleep(_KEPT[level]))

    def resume(self, tags: list[str] | None = None) -> None:
        """Brings tags back, by default all; if there is no room, nothing is lost and it can be repeated."""
        self._following(lambda: self._allocator.wake_up(tags))

    def discard(self, tags: tuple[str, ...]) -> None:
        """Throws the content of these tags away and frees their memory."""
        self._following(lambda: self._allocator.discard(tags))

    def _following(self, act: Callable[[], object]) -> None:
        try:
            act()
        finally:
            self._state = "SUSPENDED" if self._allocator.asleep else "RUNNING"

    @classmethod
    def preserves_communicators(cls) -> bool:
        """True: they are allocated outside of the tags."""
        return True
