"""PyTorch's own operator samples: the device's results, gradients and autograd graph against the CPU's.

A seeded sample within a time limit by default; SIRE_ATEN_SWEEP=all runs the whole table, SIRE_ATEN_SEED another sample.
"""

from __future__ import annotations

import os
import time
import warnings

import pytest

_LIMIT_S = 60.0


def test_a_sample_of_the_operators_agrees_with_the_cpu() -> None:
    """Forward, backward, devices of results, and presence of grad_fn."""
    pytest.importorskip("expecttest", reason="PyTorch's operator table needs the package expecttest")
    import sweep
    import torch

    whole = os.environ.get("SIRE_ATEN_SWEEP") == "all"
    seed = int(os.environ.get("SIRE_ATEN_SEED", "2"))
    chosen = sweep.choose(None, 0) if whole else sweep.choose(10_000, seed)
    until = time.monotonic() + (3600.0 if whole else _LIMIT_S)
    failures: dict[str, str] = {}
    done = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for info in chosen:
                if time.monotonic() > until:
                    break
                failure = sweep.check(info)
                done += 1
                if failure:
                    failures[sweep.name_of(info)] = failure
    finally:
        torch.set_num_threads(threads)
    assert not failures, failures
    assert done >= (len(chosen) if whole else 60), f"only {done} operators within the limit"
