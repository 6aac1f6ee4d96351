"""CUDA graphs whose own memory can be paused."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from . import _check, _library, _torch, _workspaces
from ._errors import PausedError, UnknownAddressError, UnsupportedError
from ._regions import Backup, Region, make_policy
from ._tags import encode_tag, is_within


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
    uses: Iterable[str] = (),
    **capture_options: Any,
) -> Iterator[None]:
    """Like ``torch.cuda.graph(graph)``, with the memory that the capture allocates in a region.

    Pause the tag between replays, and resume it before the next. The graph's outputs lie in this memory too:
    without ``backup`` their content is gone after a pause, until the next replay writes them. Graphs that
    shall share memory name the same ``pool``. Other options are passed to `torch.cuda.graph`.

    ``graph.replay()`` raises `PausedError` while the tag is paused, or one of those that ``uses`` names: tags of
    memory that the graph reads or writes besides its own. Where use of paused memory is checked (``SIRE_CHECK=1``,
    `sire.checked`) during the capture, they are found out, and need not be named.
    """
    tags, used = _tags(uses), _Used()
    region = Region(tag, make_policy(backup, zero_fill, retain, pageable=pageable), False, None)
    torch = _torch.ready_torch()
    if torch is None:
        raise UnsupportedError("cuda_graph captures a torch.cuda.CUDAGraph: import torch first")
    _follow(type(graph))
    if _torch.whole_process_pluggable(torch):
        # The library itself keeps what is captured apart, by the name of PyTorch's pool.
        _torch.probe_pluggable(torch)
        pool_id = pool
    else:
        pool_id = _torch.pool_of_graph(torch, graph, pool, (tag, region.policy))
    capture = torch.cuda.graph(
        graph, pool=pool_id, stream=stream, capture_error_mode=capture_error_mode, **capture_options
    )
    _workspaces.make_for_capture(torch, capture.capture_stream)
    with region.entered_for_capture(), _captured(torch, capture), _check.seen(used.note):
        yield
    used.all_of(tags, region.id)
    graph.sire_used = used


@contextmanager
def _captured(torch: Any, capture: Any) -> Iterator[None]:
    """The capture, of which the library is told; what begins it is the program's, not the region's.

    PyTorch frees its cache first thing, and what it frees during a capture the library keeps. So that is done before.
    """
    library = _library.load()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with _workspaces.room_outside(torch, capture.capture_stream):
        library.capture_begin()
        try:
            with ExitStack() as stack:
                with _workspaces.suspended():
                    stack.enter_context(capture)
                yield
        finally:
            library.capture_end()


class _Used:
    """What a graph touches: regions by number, each with the addresses seen. Without any, all of it counts."""

    def __init__(self) -> None:
        self.regions: dict[int, list[int]] = {}
        self._seen: set[int] = set()

    def note(self, address: int) -> None:
        """An operation of the capture was given memory of a region."""
        if address not in self._seen:
            self._seen.add(address)
            region = _library.load().allocation(address).region
            self.regions.setdefault(region, []).append(address)

    def all_of(self, tags: list[str], own: int) -> None:
        """The graph uses these tags and its own region, whatever was seen. What comes there later it cannot use."""
        self.regions[own] = []
        for each in _library.load().stats()["regions"] if tags else ():
            if any(is_within(each["tag"], tag) for tag in tags):
                self.regions[each["region"]] = []

    def require_usable(self) -> None:
        """Raises `PausedError` if any of it is away."""
        library = _library.load()
        for region, addresses in self.regions.items():
            if library.region_paused(region):
                self._require_usable(library, region, addresses)

    def _require_usable(self, library: _library.Library, region: int, addresses: list[int]) -> None:
        """Memory of a paused region may be freed, or stay on the device: asked where addresses are known."""
        away = not addresses
        for address in addresses:
            try:
                library.require_usable(address)
            except PausedError:
                away = True
            except UnknownAddressError:
                continue
        if away:
            tags = {each["region"]: each["tag"] for each in library.stats()["regions"]}
            raise _paused(str(tags.get(region, region)))


def _paused(tag: str) -> PausedError:
    return PausedError(
        f"the graph cannot be replayed: it uses region {tag!r}, which is paused; sire.resume({tag!r}) first"
    )


def _tags(uses: Iterable[str]) -> list[str]:
    tags = [uses] if isinstance(uses, str) else list(uses)
    for tag in tags:
        encode_tag(tag)
    return tags


def _follow(kind: Any) -> None:
    """Every replay asks first, a reset ends that. A graph that is captured again is asked for what it uses then.

    The class asks, not the graph: a function in the graph's own dictionary would either keep it alive for ever, or not
    for as long as somebody holds ``graph.replay``.
    """
    if hasattr(kind.replay, "sire_asks"):
        return
    replay, reset = kind.replay, kind.reset

    @functools.wraps(replay)
    def checked(self: Any) -> None:
        used = self.__dict__.get("sire_used")
        if used is not None:
            used.require_usable()
        replay(self)

    @functools.wraps(reset)
    def forgotten(self: Any) -> None:
        reset(self)
        self.__dict__.pop("sire_used", None)
        _torch.leave_pool(self)

    checked.sire_asks = True  # type: ignore[attr-defined]
    kind.reset = forgotten
    kind.replay = checked
