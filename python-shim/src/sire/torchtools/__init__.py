"""GPUs on a machine that several people and processes share: choosing one, reserving memory of it, finding out how
much is needed.

    from sire.torchtools import make_probe_fn, reserve_gpu_for_training, run_training_with_reservation

    with reserve_gpu_for_training(gpu=0, training_reserved_bytes=6 * 1024**3):
        train()

The names, their arguments and their environment are those of the package ``torchtools`` (``sire.compat.enable()``
makes its import lines work); what they promise is in docs/reservations.md. Without CUDA nothing is reserved, and
everything runs.
"""

from __future__ import annotations

from .._errors import ProbeError, ProbeTimeoutError, ReservationTimeoutError
from .device import get_device_from_env, select_device
from .gpu_lock import Reservation, ReservationWarning, reserve_gpu_for_training
from .gpu_scheduler import (
    ProbeFunction,
    ProbeReport,
    estimate_gpu_usage_by_probe,
    estimate_without_running,
    make_probe_fn,
    probe,
    run_training_with_reservation,
)

__all__ = [
    "ProbeError",
    "ProbeFunction",
    "ProbeReport",
    "ProbeTimeoutError",
    "Reservation",
    "ReservationTimeoutError",
    "ReservationWarning",
    "estimate_gpu_usage_by_probe",
    "estimate_without_running",
    "get_device_from_env",
    "make_probe_fn",
    "probe",
    "reserve_gpu_for_training",
    "run_training_with_reservation",
    "select_device",
]
