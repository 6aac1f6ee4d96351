"""How full GPU, host memory and disk are, now and then, and what that asks for. Moves nothing."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._threads import starting
from .._units.readings import Usage, read_cpu, read_disk, read_gpus
from ._config import MemoryConfig

_log = logging.getLogger("sire.memory")


@dataclass(frozen=True)
class MemoryStats:
    """One look at memory. ``gpus`` by number; ``gpu`` is the fullest of them, empty where there is none."""

    timestamp: float
    gpus: dict[int, Usage]
    cpu: Usage
    disk: Usage

    @property
    def gpu(self) -> Usage:
        """The fullest GPU."""
        return max(self.gpus.values(), key=lambda each: each.usage_ratio, default=Usage(0, 0))


class MemoryMonitor:
    """Looks at memory now and then, and says what should be done. All methods may be called from any thread.

    ``readers`` replace what is read, by ``"gpus"``, ``"cpu"`` and ``"disk"``: functions without arguments.
    """

    def __init__(self, config: MemoryConfig | None = None, readers: dict[str, Callable[[], Any]] | None = None) -> None:
        self.config = config or MemoryConfig()
        cache = Path(self.config.disk_cache_dir or tempfile.gettempdir()).absolute()
        defaults = {"gpus": read_gpus, "cpu": read_cpu, "disk": lambda: read_disk(cache)}
        self._read: dict[str, Callable[[], Any]] = defaults | (readers or {})
        self._history: deque[MemoryStats] = deque(maxlen=self.config.prediction_window)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._listeners: list[Callable[[MemoryStats], None] | None] = []
        self._telling = threading.RLock()
        self.seconds_spent = 0.0
        """Seconds of CPU time that looking has taken altogether."""

    # --- looking --------------------------------------------------------------------------------------------

    def look(self) -> MemoryStats:
        """Reads everything now."""
        started = time.thread_time()
        stats = MemoryStats(time.time(), self._read["gpus"](), self._read["cpu"](), self._read["disk"]())
        with self._lock:
            self._history.append(stats)
            self.seconds_spent += time.thread_time() - started
        return stats

    def get_current_stats(self) -> MemoryStats:
        """The last look; the first one if there was none."""
        with self._lock:
            if self._history:
                return self._history[-1]
        return self.look()

    def get_gpu_usage(self) -> float:
        """Share of the fullest GPU in use, now."""
        return self.look().gpu.usage_ratio

    def get_cpu_usage(self) -> float:
        """Share of host memory in use, now."""
        return self.look().cpu.usage_ratio

    def get_disk_usage(self) -> float:
        """Share of the cache's file system in use, now."""
        return self.look().disk.usage_ratio

    # --- judging --------------------------------------------------------------------------------------------

    def should_offload_from_gpu(self) -> bool:
        """Whether units should leave a GPU."""
        return self.get_current_stats().gpu.usage_ratio >= self.config.gpu_offload_threshold

    def should_emergency_offload_gpu(self) -> bool:
        """Whether everything that is not in use should leave a GPU."""
        return self.get_current_stats().gpu.usage_ratio >= self.config.gpu_emergency_threshold

    def should_offload_from_cpu(self) -> bool:
        """Whether units should go from host memory to the disk."""
        return self.get_current_stats().cpu.usage_ratio >= self.config.cpu_offload_threshold

    def should_emergency_offload_cpu(self) -> bool:
        """Whether everything that is not in use should go from host memory to the disk."""
        return self.get_current_stats().cpu.usage_ratio >= self.config.cpu_emergency_threshold

    def can_reload_to_gpu(self) -> bool:
        """Whether units may be brought before they are needed."""
        return self.get_current_stats().gpu.usage_ratio < self.config.gpu_reload_threshold

    def predict_memory_pressure(self) -> dict[str, float]:
        """Usage of ``gpu`` and ``cpu`` expected at the next look, by the trend of the last ones; between 0 and 1."""
        with self._lock:
            history = list(self._history)
        return {
            "gpu": _continued([each.gpu.usage_ratio for each in history]),
            "cpu": _continued([each.cpu.usage_ratio for each in history]),
        }

    def get_memory_summary(self) -> dict[str, Any]:
        """``timestamp``, ``gpu``, ``gpus``, ``cpu``, ``disk``, ``predicted`` and ``recommendations``."""
        stats = self.look()
        return {
            "timestamp": stats.timestamp,
            "gpu": stats.gpu.summary(),
            "gpus": {index: each.summary() for index, each in stats.gpus.items()},
            "cpu": stats.cpu.summary(),
            "disk": stats.disk.summary(),
            "predicted": self.predict_memory_pressure(),
            "recommendations": self._recommendations(),
        }

    def _recommendations(self) -> dict[str, bool]:
        return {
            "should_offload_gpu": self.should_offload_from_gpu(),
            "should_emergency_offload_gpu": self.should_emergency_offload_gpu(),
            "should_offload_cpu": self.should_offload_from_cpu(),
            "can_reload_gpu": self.can_reload_to_gpu(),
        }

    # --- now and then ---------------------------------------------------------------------------------------

    def start_monitoring(self, each_time: Callable[[MemoryStats], None] | None = None) -> None:
        """Looks every ``memory_check_interval`` seconds from now on, in a thread, and tells ``each_time`` what it saw,
        beside those that it tells already. Repeating it is harmless.
        """
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._stopping, self._thread = self._begun()
            if each_time not in self._listeners:
                self._listeners.append(each_time)

    def _begun(self) -> tuple[threading.Event, threading.Thread]:
        """A thread that looks, and what ends it."""
        stopping = threading.Event()
        thread = threading.Thread(target=self._run, args=(stopping,), name="sire-memory-monitor", daemon=True)
        try:
            with starting():
                thread.start()
        except BaseException:
            stopping.set()  # Ctrl-C may have come when it had begun
            raise
        return stopping, thread

    def stop_monitoring(self, each_time: Callable[[MemoryStats], None] | None = None) -> None:
        """Ends it, and waits for the look that may be under way; with ``each_time``, only for that one, and altogether
        when nobody else wanted it. Repeating it is harmless.
        """
        with self._lock:
            self._listeners = [each for each in self._listeners if each_time is not None and each != each_time]
            thread = None
            if not self._listeners:
                thread, self._thread = self._thread, None
                self._stopping.set()
        with self._telling:
            pass  # nobody is told after this who is not to be
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def monitoring(self) -> bool:
        """Whether it looks now and then."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def _run(self, stopping: threading.Event) -> None:
        while not stopping.wait(self.config.memory_check_interval):
            # What cannot be read or moved now may be possible at the next look, and for the next one who is told.
            with self._logged():
                stats = self.look()
                with self._telling:
                    self._tell(stats)

    def _tell(self, stats: MemoryStats) -> None:
        with self._lock:
            listeners = [each for each in self._listeners if each is not None]
        for each in listeners:
            with self._logged():
                each(stats)

    @contextmanager
    def _logged(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            _log.exception("a look at memory failed; the next is in %s s", self.config.memory_check_interval)


def _continued(values: list[float]) -> float:
    """The line through the values (least squares), one step further."""
    count = len(values)
    if count < 2:
        return values[-1] if values else 0.0
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((at - middle) ** 2 for at in range(count))
    slope = sum((at - middle) * (value - mean) for at, value in enumerate(values)) / spread
    return min(1.0, max(0.0, mean + slope * (count - middle)))
