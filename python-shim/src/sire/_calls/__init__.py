"""The library's C functions as Python calls them: each method returns the function's outputs, or raises its status.

In parts, as `cdylib/abi` has them; `loaded` is what all parts stand on. Which file is loaded is up to `_library`.
"""

from __future__ import annotations

from .others import Others
from .process import InProcess
from .regions import Regions
from .transitions import Transitions


class Library(Regions, Transitions, Others, InProcess):
    """The loaded library. Use `sire._library.load`, which checks that it is the right one."""
