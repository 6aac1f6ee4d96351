"""CUDA graphs whose own memory can be paused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import _library, _torch
from ._errors import UnsupportedError
from ._regions import Backup, Region, make_policy


@contextmanager
def cuda_graph(
    graph: Any,
    *,
    tag: str = "graph",
    backup: Backup | None = None,
    zero_fill: bool = False,
    retain: bool = False,
    pageable: bool = False,
    pool: Any = None,
    stream: Any = None,
    capture_error_mode: str = "global",
    **capture_options: Any,
) -> Iterator[None]:
    """Like ``torch.cuda.graph(graph)``, with the memory that the capture allocates in a region.

    Pause the tag between replays, and resume it before the next. The graph's outputs lie in this memory too:
    without ``backup`` their content is gone after a pause, until the next replay writes them. Graphs that
    shall share memory name the same ``pool``. Other options are passed to `torch.cuda.graph`.
    """
    region = Region(tag, make_policy(backup, zero_fill, retain, pageable=pageable), False, None)
    torch = _torch.ready_torch()
    if torch is None:
        raise UnsupportedError("cuda_graph captures a torch.cuda.CUDAGraph: import torch first")
    if _torch.whole_process_pluggable(torch):
        # The library itself keeps what is captured apart, by the name of PyTorch's pool.
        _torch.probe_pluggable(torch)
        pool_id = pool
    else:
        pool_id = _torch.pool_of_graph(torch, graph, pool, (tag, region.policy))
    capture = torch.cuda.graph(
        graph, pool=pool_id, stream=stream, capture_error_mode=capture_error_mode, **capture_options
    )
    library = _library.load()
    with region.entered_for_capture():
        library.capture_begin()
        try:
            with capture:
                yield
        finally:
            library.capture_end()
