"""Models in slices: parts that are made when they are first used, and are on the GPU while they are.

    from sire.slyce import SlyceModel

    model = SlyceModel(
        slices=[
            {"name": "encoder", "constructor": Encoder, "config": encoder_cfg},
            {"name": "decoder", "constructor": Decoder, "config": decoder_cfg},
        ],
        gpu_strategy="limit_gpu",
        max_gpu_mem_mb=6000,
        disk_cache_path="./slyce_cache",
    )
    output = model.forward(x, active_slice="encoder")

A slice that leaves the GPU goes to host memory and from there to the disk, with its state. docs/slyce.md is the guide.
"""

from __future__ import annotations

from .._units.residency import Event
from ._manager import Slice, SliceManager, Strategy
from ._model import SlyceModel
from ._summary import SliceState, SlyceSummary

__all__ = ["Event", "Slice", "SliceManager", "SliceState", "SlyceModel", "SlyceSummary", "Strategy"]
