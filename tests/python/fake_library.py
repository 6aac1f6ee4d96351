"""A stand-in for `sire._library.Library` that keeps the rules of regions and nothing else.

It is what the package is tested against where no device is needed: states, nesting, refusals, reports.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from sire._errors import error_for


class FakeLibrary:
    """Regions by (tag, policy), the threads inside them, and a gate for long calls."""

    path = "/nowhere/libsire_alloc.so"

    def __init__(self) -> None:
        self.live = False
        self.driver_live = False
        self.regions: list[tuple[str, int, bool, bool, int, bool, bool]] = []
        self.paused: set[int] = set()
        self.inside: dict[int, list[int]] = {}
        self.suspended: dict[int, int] = {}
        self.problems: list[str] = []
        self.calls: list[str] = []
        self.progresses: list[tuple[threading.Thread, list[Any]]] = []
        self.closed: list[int] = []
        self.gate: threading.Event | None = None
        self.cancelled = threading.Event()
        self.rollback_seconds = 0.0
        self.settings: dict[str, Any] = {}
        self.allocations: dict[int, int] = {}

    # --- regions -----------------------------------------------------------------------------------------

    def region_open(
        self,
        tag: bytes,
        backup: int,
        zero_fill: bool,
        retain: bool,
        clean: int = 0,
        pageable: bool = False,
        whole: bool = False,
    ) -> int:
        key = (tag.decode(), backup, zero_fill, retain, clean, pageable, whole)
        if key not in self.regions:
            self.regions.append(key)
        return self.regions.index(key)

    def region_enter(self, region: int, device: int | None, resume_if_paused: bool) -> None:
        if region in self.paused:
            if not resume_if_paused:
                raise error_for(6, f"region {self.regions[region][0]!r} is paused")
            self.paused.discard(region)
        self._stack().append(region)

    def region_leave(self, region: int) -> None:
        stack = self._stack()
        if not stack or stack[-1] != region:
            self.problems.append(f"leave {region} with {stack}")
            raise error_for(1, "not the innermost region of this thread")
        stack.pop()

    def region_current(self) -> int | None:
        stack = self._stack()
        return stack[-1] if stack else None

    def region_suspend(self) -> None:
        self.suspended[threading.get_ident()] = self.suspended.get(threading.get_ident(), 0) + 1

    def region_unsuspend(self) -> None:
        self.suspended[threading.get_ident()] -= 1

    def region_paused(self, region: int) -> bool:
        return region in self.paused

    def tags_inside(self) -> list[str]:
        """The calling thread's open tags, outermost first."""
        return [self.regions[region][0] for region in self._stack()]

    def _stack(self) -> list[int]:
        return self.inside.setdefault(threading.get_ident(), [])

    # --- memory ------------------------------------------------------------------------------------------

    def owns(self, pointer: int) -> bool:
        return any(base <= pointer < base + size for base, size in self.allocations.items())

    def keep_resident(self, pointer: int) -> int:
        base, size = next((base, size) for base, size in self.allocations.items() if base <= pointer < base + size)
        self.settings.setdefault("kept_resident", set()).add(base)
        return size

    # --- transitions -------------------------------------------------------------------------------------

    def _selected(self, tag: bytes | None) -> list[int]:
        name = None if tag is None else tag.decode()
        found = [
            number
            for number, (each, *_) in enumerate(self.regions)
            if name is None or each == name or each.startswith(name + "/")
        ]
        if name is not None and not found:
            raise error_for(4, f"no region has the tag {name!r}")
        return found

    def pause(
        self,
        tag: bytes | None,
        dead_ranges: Any = None,
        *,
        lazy: bool = False,
        idle: bool = False,
        alone: bool = False,
    ) -> dict[str, Any]:
        selected = self._selected(tag)
        self.settings |= {"lazy": lazy, "idle": idle, "alone": alone}
        self.settings["dead_ranges"] = dead_ranges
        self._long_call("pause")
        for stack in self.inside.values():
            if busy := set(stack) & set(selected):
                raise error_for(7, f"a thread is inside {self.regions[busy.pop()][0]!r}")
        changed = [number for number in selected if number not in self.paused]
        self.paused.update(changed)
        return {"regions_changed": len(changed), "regions_unchanged": len(selected) - len(changed)}

    def resume(
        self, tag: bytes | None, wait_seconds: float, order: Any = None, *, alone: bool = False
    ) -> dict[str, Any]:
        selected = self._selected(tag)
        self.settings["alone"] = alone
        self.settings["wait"] = wait_seconds
        self.settings["order"] = order
        self._long_call("resume")
        changed = [number for number in selected if number in self.paused]
        self.paused.difference_update(changed)
        return {"regions_changed": len(changed), "regions_unchanged": len(selected) - len(changed)}

    def pre_copy(self, tag: bytes | None) -> dict[str, Any]:
        selected = self._selected(tag)
        self._long_call("pre_copy")
        for number in selected:
            if not self.regions[number][4]:
                raise error_for(1, f"cannot pre-copy region {self.regions[number][0]!r}")
        open_now = [number for number in selected if number not in self.paused]
        return {"regions_changed": len(open_now), "regions_unchanged": len(selected) - len(open_now)}

    def switch(self, pause: bytes, resume: bytes, dead_ranges: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        both = set(self._selected(pause)) & set(self._selected(resume))
        if both:
            tag = self.regions[both.pop()][0]
            raise error_for(1, f"cannot switch: region {tag!r} is to be paused and to be resumed")
        return self.pause(pause, dead_ranges), self.resume(resume, 0.0)

    def _long_call(self, name: str) -> None:
        self.calls.append(name)
        self.cancelled.clear()
        while self.gate is not None and not self.gate.wait(0.005):
            if self.cancelled.is_set():
                time.sleep(self.rollback_seconds)
                raise error_for(9, f"{name} was cancelled and rolled back")

    def resume_start(self, tag: bytes | None, wait_seconds: float, order: Any = None) -> int:
        self._selected(tag)
        self.settings["order"] = order
        thread = threading.Thread(target=self._resume_behind, args=(tag, wait_seconds, order), daemon=True)
        self.progresses.append((thread, []))
        thread.start()
        return len(self.progresses)

    def _resume_behind(self, tag: bytes | None, wait_seconds: float, order: Any) -> None:
        outcomes = self.progresses[-1][1]
        try:
            outcomes.append(self.resume(tag, wait_seconds, order))
        except Exception as error:
            outcomes.append(error)

    def progress_wait(self, progress: int, pointer: int, size: int, timeout_seconds: float) -> bool:
        thread, outcomes = self.progresses[progress - 1]
        thread.join(timeout_seconds)
        if outcomes and isinstance(outcomes[0], Exception):
            raise outcomes[0]
        # Not the thread's word: a join that Ctrl-C has interrupted may take it for dead.
        return bool(outcomes)

    def progress_wait_stream(
        self, progress: int, pointer: int, size: int, device: int, stream: int, timeout_seconds: float
    ) -> bool:
        self.settings["stream"] = (device, stream)
        return self.progress_wait(progress, pointer, size, timeout_seconds)

    def progress_ready(self, progress: int, pointer: int, size: int) -> bool:
        return not self.progresses[progress - 1][0].is_alive()

    def progress_report(self, progress: int) -> dict[str, Any]:
        if not self.progress_wait(progress, 0, 0, 0.0):
            raise error_for(7, "not over")
        return dict(self.progresses[progress - 1][1][0])

    def progress_bytes(self, progress: int) -> tuple[int, int]:
        return (0, 1) if self.progresses[progress - 1][0].is_alive() else (1, 1)

    def progress_cancel(self, progress: int) -> None:
        self.cancel()

    def progress_close(self, progress: int) -> None:
        self.closed.append(progress)

    def cancel(self) -> None:
        self.calls.append("cancel")
        self.cancelled.set()

    # --- the rest ----------------------------------------------------------------------------------------

    def hook_live(self) -> bool:
        return self.live

    def driver_hook_live(self) -> bool:
        return self.driver_live

    def set_margin(self, size: int) -> None:
        self.settings["margin"] = size

    def set_disk_directory(self, path: bytes) -> None:
        self.settings["disk"] = path

    def trim(self) -> tuple[int, int]:
        return 3, 4

    def stats(self) -> dict[str, Any]:
        return {"regions": []}
