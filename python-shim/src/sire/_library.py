"""The one door to ``libsire_alloc.so``: finding it, and refusing a wrong one.

A process must hold one copy of the library, whatever route it came by (preload, this package, PyTorch's
pluggable allocator): two copies would each know half of the allocations. So a copy that is already mapped is
the one to use, and if the package would have chosen a file with other content, loading is refused.

What the library can do is in `_calls`.
"""

from __future__ import annotations

import filecmp
import os
import threading
from pathlib import Path

from ._calls import Library
from ._errors import LibraryNotFoundError, VersionMismatchError

__all__ = [
    "DRIVER_LIBRARY_NAME",
    "LIBRARY_NAME",
    "Library",
    "driver_library_path",
    "is_loaded",
    "library_path",
    "load",
    "mapped_copies",
]

LIBRARY_NAME = "libsire_alloc.so"
DRIVER_LIBRARY_NAME = "libsire_driver.so"

_PACKAGE = Path(__file__).resolve().parent

_loaded: Library | None = None
_loading = threading.Lock()


def load() -> Library:
    """The library of this process, loaded at the first call."""
    global _loaded
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _load()
        from .control import open_as_told

        open_as_told()
    return _loaded


def is_loaded() -> bool:
    """Whether `load` has succeeded."""
    return _loaded is not None


def library_path() -> Path:
    """The file that this package uses, without loading it."""
    named = os.environ.get("SIRE_LIBRARY")
    if named:
        path = Path(named)
        if not path.is_file():
            raise LibraryNotFoundError(f"SIRE_LIBRARY names {named}, which is not a file")
        return path.absolute()
    packaged = _PACKAGE / "_native" / LIBRARY_NAME
    if packaged.is_file():
        return packaged
    built = [path for path in _checkout_candidates() if path.is_file()]
    if built:
        return max(built, key=lambda path: path.stat().st_mtime)
    raise LibraryNotFoundError(
        f"{LIBRARY_NAME} is neither named in SIRE_LIBRARY nor in {packaged.parent}"
        f"{_checkout_note()}. Install the package with pip, or build the library with "
        "'cargo build --release' in the checkout."
    )


def driver_library_path() -> Path:
    """The library for driver-level hooks: beside the other one, as both are of one build."""
    path = library_path().with_name(DRIVER_LIBRARY_NAME)
    if not path.is_file():
        raise LibraryNotFoundError(
            f"driver-level hooks need {DRIVER_LIBRARY_NAME}, which is not at {path}. Reinstall the package, or build "
            "it with 'cargo build --release -p sire-driver-hooks' in the checkout."
        )
    return path


def mapped_copies(maps: str | None = None) -> list[str]:
    """The files named ``libsire_alloc.so`` that are mapped into this process."""
    if maps is None:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    paths: dict[str, None] = {}
    for line in maps.splitlines():
        columns = line.split(maxsplit=5)
        if len(columns) == 6 and _is_library_name(columns[5]):
            paths[columns[5]] = None
    return list(paths)


_DELETED = " (deleted)"


def _is_library_name(path: str) -> bool:
    return path.removesuffix(_DELETED).rpartition("/")[2] == LIBRARY_NAME


def _load() -> Library:
    mapped = mapped_copies()
    if not mapped:
        return _checked(library_path())
    if len(mapped) > 1:
        raise VersionMismatchError(
            f"this process has loaded several copies of the library ({', '.join(mapped)}), each of which "
            "knows only its own allocations. Preload and load the same file: $(sire path)."
        )
    [present] = mapped
    if present.endswith(_DELETED):
        raise VersionMismatchError(
            f"the library that this process loaded, {present.removesuffix(_DELETED)}, was replaced or removed "
            "since. Restart the process."
        )
    try:
        wanted: Path | None = library_path()
    except LibraryNotFoundError:
        wanted = None
    if wanted is not None and not _same_content(wanted, Path(present)):
        raise VersionMismatchError(
            f"this process has loaded {present} (by LD_PRELOAD or otherwise), but the package uses {wanted}, "
            "which is another build. Preload the package's own: LD_PRELOAD=$(sire path)."
        )
    return _checked(Path(present))


def _checked(path: Path) -> Library:
    library = Library(str(path))
    library.check(_recorded_build_id())
    return library


def _recorded_build_id() -> str | None:
    """The build that the installed package was made with; None in a checkout."""
    try:
        return (_PACKAGE / "_native" / "build_id.txt").read_text().strip()
    except OSError:
        return None


def _same_content(one: Path, other: Path) -> bool:
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)


def _checkout() -> Path | None:
    """The repository that this package lies in, if it is used from there."""
    root = _PACKAGE.parents[2]
    return root if (root / "cdylib").is_dir() and (root / "Cargo.toml").is_file() else None


def _checkout_candidates() -> list[Path]:
    root = _checkout()
    if root is None:
        return []
    return [root / "target" / kind / LIBRARY_NAME for kind in ("release", "debug")]


def _checkout_note() -> str:
    root = _checkout()
    return f" nor in {root / 'target'}" if root else ""
