"""``NCCL_GRAPH_REGISTER``: whether NCCL registers the buffers that captured collectives use.

NCCL keeps the physical handles of what it has registered. After a pause and a resume other memory lies behind the
same addresses, so a replay of such a graph uses memory that is gone, or hangs. So the setting is 0 from the first
region on, unless the program has said otherwise; and where that came too late, or the program insists, a pause says
so.
"""

from __future__ import annotations

import os
import sys

_SETTING = "NCCL_GRAPH_REGISTER"
_prepared = False
_too_late = False


def prepare() -> None:
    """Switches it off for communicators that are made from now on. Once; a value that is there stays."""
    global _prepared, _too_late
    if _prepared:
        return
    _prepared = True
    if _SETTING not in os.environ:
        _too_late = has_communicators()
        os.environ[_SETTING] = "0"


def notes() -> tuple[str, ...]:
    """What a pause has to say about it; nothing where there is no communicator."""
    value = os.environ.get(_SETTING, "")
    if (value == "0" and not _too_late) or not has_communicators():
        return ()
    why = "was set after NCCL had started" if value == "0" else f"is {value or 'not set'}"
    return (
        f"{_SETTING} {why}: NCCL may have registered memory of this pause for captured collectives, whose replay "
        f"would use memory that is gone; start with {_SETTING}=0, or keep such buffers outside regions",
    )


def has_communicators() -> bool:
    """Whether a process group of this process works with NCCL."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    groups = distributed.distributed_c10d._world.pg_map
    return any("nccl" in str(backend) for backend, _ in groups.values())
