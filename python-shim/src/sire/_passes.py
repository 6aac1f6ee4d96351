"""The end of the backward pass that is running, however it ends.

Autograd calls back at the end of a pass, but only of one that succeeds. A pass that raises (out of memory, a hook of
the program's) drops what it was to call; that is taken for the end then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


def at_end(ended: Callable[[bool], object]) -> None:
    """Has ``ended`` called once when the running backward pass is over; with True if the pass failed, from the thread
    that cleans up after it, where it must raise nothing. To be called from inside the pass.
    """
    import torch

    torch.autograd.Variable._execution_engine.queue_callback(_End(ended))


def number() -> int:
    """Which backward pass the calling thread works on; no two have the same number. -1 outside of any."""
    import torch

    return int(torch._C._current_graph_task_id())


def caller() -> int | None:
    """The thread that waits for the backward pass which the calling thread works on; None where that is the calling
    one itself, and where nobody can tell, because several threads wait for passes.
    """
    from torch.autograd import graph

    if number() == -1:
        return None
    asked = graph._engine_run_backward.__code__
    waiting = [thread for thread, frame in sys._current_frames().items() if frame.f_code is asked]
    return waiting[0] if len(waiting) == 1 else None


class _End:
    def __init__(self, ended: Callable[[bool], object]) -> None:
        self._ended = [ended]

    def __call__(self) -> None:
        self._tell(failed=False)

    def __del__(self) -> None:
        self._tell(failed=True)

    def _tell(self, failed: bool) -> None:
        if self._ended:
            self._ended.pop()(failed)
