"""Models made of slices, ready to use: a stack of transformer layers, and an encoder with a decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._errors import InvalidArgumentError
from ._model import SlyceModel


class TransformerStack(SlyceModel):
    """``layers`` layers of `nn.TransformerEncoderLayer`, ``layers_per_slice`` of them in each slice, run in order.

    ``options`` are `SlyceModel`'s; ``layer_options`` those of the layer, such as ``dim_feedforward`` or
    ``batch_first``.
    """

    def __init__(
        self,
        layers: int,
        d_model: int,
        nhead: int,
        *,
        layers_per_slice: int = 1,
        layer_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if layers < 1 or layers_per_slice < 1:
            raise InvalidArgumentError("layers and layers_per_slice are 1 or more")
        shape = {"d_model": d_model, "nhead": nhead, **(layer_options or {})}
        starts = range(0, layers, layers_per_slice)
        slices = [
            {
                "name": f"layers_{start}",
                "constructor": _Layers,
                "config": {"count": min(layers_per_slice, layers - start), "shape": shape},
            }
            for start in starts
        ]
        super().__init__(slices, **options)
        self.schedule(self.slice_names)

    def forward(self, *inputs: Any, active_slice: str | None = None, **named: Any) -> Any:
        """All layers in order on one input, with the same masks for each; with ``active_slice`` only that slice."""
        if active_slice is not None:
            return super().forward(*inputs, active_slice=active_slice, **named)
        (value,) = inputs
        for name in self.slice_names:
            value = self.run_slice(name, value, **named)
        return value


class EncoderDecoder(SlyceModel):
    """An encoder and a decoder of transformer layers as two slices: ``model(source, target)``."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        *,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        layer_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        shape = {"d_model": d_model, "nhead": nhead, **(layer_options or {})}
        slices = [
            {"name": "encoder", "constructor": _encoder, "config": {"layers": encoder_layers, "shape": shape}},
            {"name": "decoder", "constructor": _decoder, "config": {"layers": decoder_layers, "shape": shape}},
        ]
        super().__init__(slices, **options)
        self.schedule(self.slice_names)

    def forward(self, *inputs: Any, active_slice: str | None = None, **named: Any) -> Any:
        """Decodes ``target`` with what the encoder made of ``source``; with ``active_slice`` runs only that slice."""
        if active_slice is not None:
            return super().forward(*inputs, active_slice=active_slice, **named)
        source, target = inputs
        memory = self.run_slice("encoder", source)
        return self.run_slice("decoder", target, memory, **named)


class _Layers(nn.Module):  # type: ignore[misc]
    """Some layers in a row."""

    def __init__(self, count: int, shape: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(**shape) for _ in range(count)])

    def forward(self, value: Any, **named: Any) -> Any:
        for layer in self.layers:
            value = layer(value, **named)
        return value


def _encoder(layers: int, shape: dict[str, Any]) -> nn.Module:
    made: nn.Module = nn.TransformerEncoder(nn.TransformerEncoderLayer(**shape), layers, enable_nested_tensor=False)
    return made


def _decoder(layers: int, shape: dict[str, Any]) -> nn.Module:
    made: nn.Module = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape), layers)
    return made
