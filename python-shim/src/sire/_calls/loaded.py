"""A file that is loaded as the library: whether it is the one that belongs to this package, and how it is called."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_void_p
from typing import Any

from .. import _interface
from .._errors import LibraryNotFoundError, VersionMismatchError, error_for
from .._version import __version__

ABI_VERSION = 1
ADVICE = (
    "Reinstall the package (pip install --force-reinstall ./python-shim), or name the library that belongs "
    "to it in SIRE_LIBRARY."
)


class Loaded:
    """The library in a file, whose functions have no methods yet."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._c = ctypes.CDLL(path)
            self._plain_signatures()
        except (OSError, AttributeError) as error:
            raise LibraryNotFoundError(f"{path} cannot be loaded as Sire's library: {error}. {ADVICE}") from error

    def _plain_signatures(self) -> None:
        c = self._c
        c.sire_abi_version.restype = c_uint32
        c.sire_version.restype = c_char_p
        c.sire_build_id.restype = c_char_p
        c.sire_last_error.argtypes = [c_char_p, c_size_t]
        c.sire_last_error.restype = c_size_t
        c.sire_owns.argtypes = [c_void_p]
        c.sire_owns.restype = c_bool

    def _complete_signatures(self) -> None:
        for name, arguments in _interface.SIGNATURES.items():
            function = getattr(self._c, name, None)
            if function is None:
                raise VersionMismatchError(f"{self.path} has no function {name}. {ADVICE}")
            function.argtypes = arguments
            function.restype = c_int32

    def check(self, build_id: str | None) -> None:
        """Refuses a library that this package was not built for."""
        abi = int(self._c.sire_abi_version())
        if abi != ABI_VERSION:
            raise VersionMismatchError(
                f"{self.path} speaks version {abi} of the C interface, this package "
                f"(sire-alloc {__version__}) speaks {ABI_VERSION}. {ADVICE}"
            )
        if self.version != __version__:
            raise VersionMismatchError(
                f"{self.path} is version {self.version}, this package is {__version__}. {ADVICE}"
            )
        if build_id is not None and self.build_id != build_id:
            raise VersionMismatchError(
                f"{self.path} is build {self.build_id}, this package was built with {build_id}. {ADVICE}"
            )
        self._complete_signatures()

    @property
    def version(self) -> str:
        """The library's version."""
        return str(self._c.sire_version().decode())

    @property
    def build_id(self) -> str:
        """A hash of the sources that the library was built from."""
        return str(self._c.sire_build_id().decode())

    @property
    def c(self) -> Any:
        """The functions themselves, for names that have no method here."""
        return self._c

    def _call(self, name: str, *arguments: Any) -> None:
        status = int(getattr(self._c, name)(*arguments))
        if status != 0:
            raise error_for(status, self._last_error())

    def _last_error(self) -> str:
        length = int(self._c.sire_last_error(None, 0))
        buffer = ctypes.create_string_buffer(length + 1)
        self._c.sire_last_error(buffer, length + 1)
        return buffer.value.decode(errors="replace")

    def _text(self, name: str, *arguments: Any) -> bytes:
        """A text output, as long as it has become by the time that it fits."""
        length = c_size_t(4096)
        while True:
            buffer = ctypes.create_string_buffer(length.value + 1)
            self._call(name, *arguments, buffer, length.value + 1, byref(length))
            if length.value < len(buffer):
                return buffer.value
