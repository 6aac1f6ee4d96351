"""The allocator of vLLM's sleep mode: its methods and their meaning, as regions, pause and resume.

vLLM says at each sleep which tags are kept; Sire's regions say it when they are opened. So every tag is a region
with a backup, under one parent, and what a sleep does not keep is shown to the engine as memory that holds nothing.
One pause of the parent is then one transaction over all tags, and leaves no mark for the next.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import _blocks, _callbacks, _interrupt, _library, _memory, _regions, _transitions
from .._errors import InvalidArgumentError
from .._report import Report
from .._sizes import format_size
from .._tags import encode_tag, is_within
from . import _segments

PARENT = "vllm"
"""Above every tag of vLLM's, so that ``sire.pause("vllm")`` and ``sire.stats()`` find them."""

_log = logging.getLogger("sire.vllm")
_making = threading.Lock()


class SireAllocator:
    """What vLLM's ``get_mem_allocator_instance()`` returns, made of regions.

    The names and the meaning of arguments are vLLM's. What differs: every failure is a `sire.SireError`, changes
    nothing, and can be tried again; repeating a call is harmless; `keep` excepts tensors from being thrown away.
    Threads may call it at the same time; vLLM's rule that nothing uses sleeping memory holds.
    """

    default_tag = "default"
    instance: SireAllocator | None = None

    @staticmethod
    def get_instance() -> SireAllocator:
        """The one of this process."""
        with _making:
            if SireAllocator.instance is None:
                SireAllocator.instance = SireAllocator()
            return SireAllocator.instance

    def __init__(self) -> None:
        self._kept: list[Callable[[], Any]] = []
        self._keeping = threading.Lock()

    # --- allocating -----------------------------------------------------------------------------------------

    @contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        """What the calling thread allocates inside belongs to ``tag``. `PausedError` while that is asleep.

        At the end, segments in which nothing lives any more go back to the driver.
        """
        with _regions.region(_path(self.default_tag if tag is None else tag), backup="cpu"):
            yield
        _segments.return_free(_is_ours)

    def get_current_usage(self) -> int:
        """Device bytes that the tags hold, asleep or awake; 0 once every tensor is gone."""
        _segments.return_free(_is_ours)
        return sum(int(each["resident_bytes"]) + int(each["paused_bytes"]) for each in _our_regions())

    def keep(self, *owners: Any) -> None:
        """Tensors, and buffers of modules (those they have at the time of the sleep), survive every sleep, discard
        and level 2 included. They are held weakly.
        """
        for owner in owners:
            if not hasattr(owner, "data_ptr") and not hasattr(owner, "buffers"):
                raise InvalidArgumentError(f"keep takes tensors and modules, not a {type(owner).__name__}")
        with self._keeping:
            self._kept += [weakref.ref(owner) for owner in owners]

    # --- sleeping and waking --------------------------------------------------------------------------------

    def sleep(self, offload_tags: tuple[str, ...] | str | None = None) -> Report | None:
        """Everything gives its physical memory back; the content of ``offload_tags``, and of what lies under them, goes
        to host memory, that of the other tags is lost. All tags, or none if it fails. What is asleep already stays as
        it is.

        None means ``("default",)``. Returns the report of the pause; None if there are no tags yet.
        """
        kept = {_path(tag) for tag in _tags((self.default_tag,) if offload_tags is None else offload_tags)}
        report = self._pause(PARENT, lambda path: not any(is_within(path, each) for each in kept))
        _empty_cache()
        return report

    def discard(self, tags: tuple[str, ...] | str) -> None:
        """These tags give their memory back and lose their content; the others stay awake."""
        for tag in _tags(tags):
            self._pause(_path(tag), lambda path: True)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Memory comes back at the same addresses, with what was kept; the rest is undefined. None means every tag.

        `sire.OutOfMemoryError` if there is no room: whatever slept still sleeps, its backup is there, and the call
        can be repeated. Of several tags, those woken before the failure stay awake.
        """
        wanted = [PARENT] if tags is None else [_path(tag) for tag in _tags(tags)]
        for path in wanted:
            _known(_transitions.resume, path)

    @property
    def asleep(self) -> bool:
        """Whether any tag is."""
        return any(each["state"] == "paused" for each in _our_regions())

    def _pause(self, tag: str, is_lost: Callable[[str], bool]) -> Report | None:
        report = _known(lambda path: _pause_losing(path, lambda regions: self._holding_nothing(regions, is_lost)), tag)
        if report is not None and report.changed:
            _log.info(
                "sleep of %s: %s given back, %s copied to host memory, %s thrown away or free",
                tag,
                format_size(report.bytes_moved),
                format_size(report.bytes_copied),
                format_size(report.bytes_dead),
            )
        return report

    def _holding_nothing(self, regions: list[int], is_lost: Callable[[str], bool]) -> _blocks.Ranges:
        """Free blocks, and all memory of tags that are lost but for what is kept."""
        free = _blocks.block_map()
        found = free(regions) if free is not None else []
        lost = _segments.of_tags(lambda path: _is_ours(path) and is_lost(path))
        return _segments.without(found + lost, self._spans())

    def _spans(self) -> _blocks.Ranges:
        """Addresses and sizes of what `keep` named and what still lives."""
        with self._keeping:
            owners = [owner for owner in (each() for each in self._kept) if owner is not None]
            self._kept = [weakref.ref(owner) for owner in owners]
        spans = [_memory.span(tensor, "keep")[0] for tensor in _tensors(owners) if tensor.is_cuda]
        return [(where.pointer, where.size) for where in spans if where.size]


def _pause_losing(path: str, dead: Callable[[list[int]], _blocks.Ranges]) -> Report:
    encoded, library = encode_tag(path), _transitions.ready("sleep")
    done: list[dict[str, Any]] = []
    with _callbacks.around_pause(path, done):
        _interrupt.run(lambda: done.append(library.pause(encoded, dead)), library.cancel)
    return Report("pause", path, **done[0])


def _known(act: Callable[[str], Report], path: str) -> Report | None:
    """The report; None if nothing was ever allocated under that tag, which vLLM takes for granted."""
    tags = {str(each["tag"]) for each in _our_regions()}
    return act(path) if any(is_within(tag, path) for tag in tags) else None


def _tensors(owners: Iterable[Any]) -> Iterator[Any]:
    for owner in owners:
        if hasattr(owner, "data_ptr"):
            yield owner
        else:
            yield from owner.buffers()


def _tags(tags: object) -> list[str]:
    given = [tags] if isinstance(tags, str) else tags
    if not isinstance(given, tuple | list) or not all(isinstance(tag, str) for tag in given):
        raise InvalidArgumentError(f"tags are a str, or a tuple or list of them, not {tags!r}")
    return list(given)


def _path(tag: object) -> str:
    if not isinstance(tag, str):
        raise InvalidArgumentError(f"a tag is a str such as 'weights', not {tag!r}")
    return f"{PARENT}/{tag}"


def _is_ours(path: str) -> bool:
    return path.startswith(f"{PARENT}/")


def _our_regions() -> list[dict[str, Any]]:
    return [each for each in _library.load().stats()["regions"] if _is_ours(each["tag"])]


def _empty_cache() -> None:
    from .._torch import cuda_in_use

    torch = cuda_in_use()
    if torch is not None:
        torch.cuda.empty_cache()
