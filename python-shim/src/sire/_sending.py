"""Tensors of regions on their way to another process: sent where that works, refused by name where it does not.

``torch.multiprocessing`` sends a CUDA tensor as a handle of its segment. For memory of `cudaMalloc` that is a legacy
handle, which the driver makes for no memory that can be paused; PyTorch then says no more than "invalid argument".
For expandable segments it is an exported handle: that works, and the segment stays on the device from then on
(`sire.held`).
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from . import _library
from ._errors import UnsupportedError

_installing = threading.Lock()
_installed = False


def install(torch: Any) -> None:
    """From now on a refusal names the region. Once."""
    global _installed
    with _installing:
        if _installed:
            return
        _installed = True
    original = torch.UntypedStorage._share_cuda_

    @functools.wraps(original)
    def _share_cuda_(self: Any, *args: Any, **keywords: Any) -> Any:
        try:
            return original(self, *args, **keywords)
        except RuntimeError as error:
            tag = _tag(int(self.data_ptr()))
            if tag is None:
                raise
            raise UnsupportedError(
                f"a tensor of region {tag!r} cannot be sent to another process: the driver makes no handle for "
                "memory that can be paused. Send tensor.cpu(), or a copy made outside regions "
                "(with sire.disable(): copy = tensor.clone())."
            ) from error

    torch.UntypedStorage._share_cuda_ = _share_cuda_


def _tag(address: int) -> str | None:
    """The tag of the region that holds an address; None if none does."""
    library = _library.load()
    if address == 0 or not library.owns(address):
        return None
    region = library.allocation(address).region
    return next((str(each["tag"]) for each in library.stats()["regions"] if each["region"] == region), None)
