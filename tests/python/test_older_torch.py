"""What is mended of older PyTorch, on a stand-in for it that knows which pools are current; tests/python/device has the
real ones, as far as they are installed.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from sire import _older_torch

POOL, OTHER, GRAPHS = (0, 1), (0, 2), (1, 0)


class OlderTorch:
    """A version of PyTorch: `current` are the pools that are, `graph_class` captures into one until told to fail."""

    def __init__(self, version: str) -> None:
        self.__version__ = version
        self.current: list[tuple[int, tuple[int, int]]] = []
        self.told: list[dict[str, Any]] = []
        self.fails: str | None = None
        outer = self

        class CUDAGraph:
            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **more: Any) -> None:
                outer.told.append(more)
                outer.begin(0, pool)
                self.pool = pool
                if outer.fails == "begin":
                    raise RuntimeError("a capture is going on")

            def capture_end(self) -> None:
                if outer.fails == "end":
                    raise RuntimeError("the capture is void")
                outer.end(0, self.pool)

        memory = SimpleNamespace(
            _cuda_beginAllocateCurrentThreadToPool=self.begin,
            _cuda_endAllocateToPool=self.end,
            _cuda_releasePool=lambda device, pool: None,
        )
        self.cuda = SimpleNamespace(
            memory=memory, CUDAGraph=CUDAGraph, graph_pool_handle=lambda: GRAPHS, current_device=lambda: 0
        )

    def begin(self, device: int, pool: tuple[int, int]) -> None:
        self.current.append((device, tuple(pool)))

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if (device, tuple(pool)) not in self.current:
            raise RuntimeError("not recording to this pool")
        self.current.remove((device, tuple(pool)))


@pytest.fixture(params=["2.9.1", "2.10.0+cu128", "2.11.0"])
def older(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OlderTorch:
    """One that is mended."""
    monkeypatch.setattr(_older_torch, "_is_mended", False)
    made = OlderTorch(request.param)
    _older_torch.mend(made)
    return made


def dropped() -> bool:
    """Whether pools would be dropped now."""
    retired = ["a pool"]
    _older_torch.drop_unused(retired)
    return not retired


def test_no_pool_is_dropped_while_the_program_has_one_current(older: OlderTorch) -> None:
    memory = older.cuda.memory
    assert dropped()
    for pool in (POOL, OTHER):
        memory._cuda_beginAllocateCurrentThreadToPool(0, pool)
    for pool in (OTHER, POOL):
        assert not dropped()
        memory._cuda_endAllocateToPool(0, pool)
        assert not dropped(), "PyTorch has not released it yet"
        memory._cuda_releasePool(0, pool)
    assert dropped()
    assert older.current == []


class MemPool:
    """A pool that nobody else holds."""

    def use_count(self) -> int:
        return 1


def test_a_graphs_pool_goes_when_no_pool_is_current(older: OlderTorch) -> None:
    """From 2.11 on it went with the graph, wherever that was: beside a current pool that ended the process."""
    memory, graph, pool = older.cuda.memory, older.cuda.CUDAGraph(), MemPool()
    _older_torch.keep(older, graph, pool)
    gone = weakref.ref(pool)
    memory._cuda_beginAllocateCurrentThreadToPool(0, POOL)
    del graph, pool
    _older_torch.drop_unused([])
    assert gone() is not None
    memory._cuda_endAllocateToPool(0, POOL)
    memory._cuda_releasePool(0, POOL)
    _older_torch.drop_unused([])
    assert gone() is None


def test_no_pool_is_dropped_during_a_capture(older: OlderTorch) -> None:
    graph = older.cuda.CUDAGraph()
    graph.capture_begin(check_input_liveness=True)
    assert older.told == [{"check_input_liveness": True}], "what it does not know it passes on"
    assert not dropped()
    graph.capture_end()
    assert dropped()


@pytest.mark.parametrize("where", ["begin", "end"])
def test_a_capture_that_fails_leaves_no_pool_current(older: OlderTorch, where: str) -> None:
    memory, graph = older.cuda.memory, older.cuda.CUDAGraph()
    memory._cuda_beginAllocateCurrentThreadToPool(0, POOL)
    older.fails = where
    with pytest.raises(RuntimeError, match="capture"):
        graph.capture_begin()
        graph.capture_end()
    assert older.current == [(0, POOL)], "the one around it"
    assert not dropped()
    memory._cuda_endAllocateToPool(0, POOL)
    memory._cuda_releasePool(0, POOL)
    assert dropped()


def test_a_capture_that_began_before_the_mend_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_older_torch, "_is_mended", False)
    older = OlderTorch("2.11.0")
    graph = older.cuda.CUDAGraph()
    graph.capture_begin(pool=GRAPHS)
    _older_torch.mend(older)
    graph.capture_end()
    assert dropped()
