"""The default pools, and what `sire` does with them."""

from __future__ import annotations

import os
import threading
from typing import Any

from .. import _library, _torch
from .._adopt import Release
from .._errors import InvalidArgumentError, LibraryNotFoundError
from ._pools import (
    ResourcePoolCPU,
    ResourcePoolCUDA,
    ResourcePoolDisk,
    ResourcePoolManagement,
    Share,
    existing_management,
    set_resource_management,
)

_lock = threading.RLock()
_release: Release = "eager"


def default_release() -> Release:
    """How objects are offloaded that say nothing about it."""
    return _release


def setup_default_pools(
    *,
    vram_limit: Share | None = None,
    headroom: Share = 0,
    ram_limit: Share | None = None,
    disk_dir: str | os.PathLike[str] | None = None,
    disk_limit: Share | None = None,
    release: Release | None = None,
    residency: float = 0.0,
) -> ResourcePoolManagement:
    """Makes a pool for each CUDA device, for the host's memory, and for the disk. Calling it again is harmless.

    ``vram_limit`` is the most that managed objects may hold of each device, ``headroom`` what stays free there for
    others: sizes such as ``"6GiB"``, or percentages. ``release="eager"`` gives device memory back as soon as nobody
    uses an object; ``"lazy"`` leaves it until somebody needs it, so that coming back costs nothing if nobody did.
    ``residency`` is for how many seconds after its last use an object is spared while another could make way.
    ``ram_limit``, ``disk_dir`` and ``disk_limit`` are what the pools of host memory and of the disk report; backups are
    limited by ``SIRE_HOST_LIMIT`` and ``SIRE_DISK_LIMIT``.

    Without a device, or without Sire's library, there is no pool of a device, and everything stays on the CPU.
    Called again with arguments, it sets the limits of the pools that there are anew, each to its argument or default.
    """
    global _release
    given = (vram_limit, headroom, ram_limit, disk_dir, disk_limit, release, residency)
    with _lock:
        management = existing_management()
        if management is not None and given == (None, 0, None, None, None, None, 0.0):
            return management
        if release is not None:
            if release not in ("eager", "lazy"):
                raise InvalidArgumentError(f"release is 'eager' or 'lazy', not {release!r}")
            _release = release
        management = management or ResourcePoolManagement()
        if management.get_resource_pool("cpu") is None:
            management.set_resource_pool("cpu", ResourcePoolCPU(limit=ram_limit))
        elif ram_limit is not None:
            _changed(management, "cpu", ram_limit)
        if disk_dir is not None or disk_limit is not None or management.get_resource_pool("disk") is None:
            management.set_resource_pool("disk", ResourcePoolDisk(disk_dir, limit=disk_limit))
        for device in _cuda_devices():
            _set_up_device(management, device, vram_limit, headroom, residency)
        set_resource_management(management)
        return management


initialize = setup_default_pools
"""Another name for `setup_default_pools`."""


def _set_up_device(
    management: ResourcePoolManagement, device: Any, limit: Share | None, headroom: Share, residency: float
) -> None:
    pool = management.get_resource_pool(device)
    if isinstance(pool, ResourcePoolCUDA):
        pool.residency = residency
        pool.set_limits(limit, headroom)
    elif pool is None:
        pool = ResourcePoolCUDA(device, limit=limit, headroom=headroom, residency=residency)
        management.set_resource_pool(device, pool)


def _changed(management: ResourcePoolManagement, device: Any, limit: Share) -> None:
    pool = management.get_resource_pool(device)
    if pool is not None:
        pool.set_limits(limit)


def _cuda_devices() -> list[Any]:
    import torch

    try:
        _library.load()
    except LibraryNotFoundError:
        return []
    if not torch.cuda.is_available():
        return []
    _torch.ready_torch()
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
