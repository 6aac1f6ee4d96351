"""LoRA as a commit: low-rank deltas from a safetensors file or a state dict, merged into the weights they are for.

Each pair of matrices makes one delta, ``up @ down * scale * alpha / rank``, which is computed in fp32 and added to the
weight in fp32 with one rounding. Weights that are not plain floating-point numbers of 16 bits or more (quantized ones)
are left alone: there the two matrices run beside the layer, as a forward hook.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .._errors import InvalidArgumentError, UnsupportedError
from .._safetensors import read_header
from ._commits import CommitABC, Revert
from ._weight_commits import added, hooked, written

Mode = Literal["auto", "merge", "side"]

_DOWN = re.compile(r"(?P<target>.+?)\.(?:lora_A(?:\.[^.]+)?\.weight|lora_down\.weight|lora\.down\.weight|lora_A)$")
_UP = re.compile(r"(?P<target>.+?)\.(?:lora_B(?:\.[^.]+)?\.weight|lora_up\.weight|lora\.up\.weight|lora_B)$")
_EMBEDDING = re.compile(r"(?P<target>.+?)\.lora_embedding_(?P<which>[AB])(?:\.[^.]+)?$")
_ALPHA = re.compile(r"(?P<target>.+?)\.alpha$")
_FLAT = re.compile(r"^lora_(?:unet|te\d?|transformer|prior_unet)_")
_BEYOND = ("lora_magnitude_vector", "dora_scale", "lora_mid", "hada_", "lokr_")


@dataclass
class _Pair:
    """What a file says about one layer."""

    down: Any = None
    up: Any = None
    alpha: float | None = None
    embedding: bool = False
    keys: list[str] = field(default_factory=list)

    def factor(self, scale: float) -> float:
        """What the product of the matrices is multiplied with."""
        return scale if self.alpha is None else scale * self.alpha / self.down.shape[0]


class LoraCommit(CommitABC[Any]):
    """The LoRA of a safetensors file or of a state dict, ``scale`` times as strong as it says.

    Names of PEFT (``lora_A``, ``lora_B``), of kohya (``lora_down``, ``lora_up``, ``alpha``, flat names) and of
    diffusers (``lora.down``, ``lora.up``) are understood; wrappers' prefixes are skipped. ``mode``: ``"merge"`` writes
    into the weights, ``"side"`` runs beside the layers, ``"auto"`` merges what can be merged. The state is read when
    the commit is made, so that the file may go afterwards. A name that is not understood, or whose layer the module
    does not have, is an error, and nothing is written.
    """

    def __init__(
        self, source: str | os.PathLike[str] | Mapping[str, Any], scale: float = 1.0, mode: Mode = "auto"
    ) -> None:
        if mode not in ("auto", "merge", "side"):
            raise InvalidArgumentError(f"mode is 'auto', 'merge' or 'side', not {mode!r}")
        state = dict(source) if isinstance(source, Mapping) else _read(os.fspath(source))
        self._pairs = _pairs(state)
        self._mode = mode
        self.scale = float(scale)

    def apply(self, obj: Any, **kwargs: Any) -> Revert:
        """Merges, or hooks."""
        modules = dict(obj.named_modules())
        found = [(name, _target(modules, name), pair) for name, pair in self._pairs.items()]
        merged = [
            (name, module.weight, (pair, _is_turned(module, pair)))
            for name, module, pair in found
            if self._merges(module, name, pair)
        ]
        beside = [each for each in found if not self._merges(each[1], each[0], each[2])]
        for _, module, pair in found:
            _check_shape(module, pair)
        paths: list[tuple[Any, Any]] = [
            (module, _SidePath(name, module, pair, pair.factor(self.scale))) for name, module, pair in beside
        ]
        unhook = hooked(paths, "forward", with_kwargs=True)
        try:
            revert = written(merged, self._new)
        except BaseException:
            unhook(obj)
            raise

        def undo(base: Any) -> None:
            unhook(base)
            revert(base)

        return undo

    def _merges(self, module: Any, name: str, pair: _Pair) -> bool:
        plain = _is_plain(module.weight)
        if self._mode == "merge" and not plain:
            raise UnsupportedError(
                f"the weight of {name!r} is {module.weight.dtype} and cannot be merged into; use mode='auto' or 'side'"
            )
        return plain and (self._mode != "side" or pair.embedding)

    def _new(self, name: str, tensor: Any, change: tuple[_Pair, bool]) -> Any:
        pair, turned = change
        return added(tensor, _delta(pair, tensor, turned), pair.factor(self.scale))


class _SidePath:
    """The two matrices beside a layer: their product with its input is added to its output."""

    def __init__(self, name: str, module: Any, pair: _Pair, factor: float) -> None:
        is_convolution = _is_convolution(module)
        if not is_convolution and (pair.embedding or pair.down.dim() > 2 or _is_no_linear_layer(module)):
            raise UnsupportedError(
                f"{name!r} is a {type(module).__name__} whose weight is not merged into, and beside which no LoRA can "
                "run: that is done for linear layers, and for convolutions of one group that are not transposed"
            )
        self._pair = pair
        self._factor = factor
        self._through = _through_convolution if is_convolution else _through_linear
        self._there: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        x = inputs[0] if inputs else next(iter(named.values()))
        down, up = self._on(x.device)
        return output + (self._through(module, x.float(), down, up) * self._factor).to(output.dtype)

    def _on(self, device: Any) -> tuple[Any, Any]:
        import torch

        if device not in self._there:
            # They are kept, also for calls whose backward pass wants them.
            with torch.inference_mode(False):
                self._there[device] = (_plainly(self._pair.down, device), _plainly(self._pair.up, device))
        return self._there[device]


def _plainly(matrix: Any, device: Any) -> Any:
    import torch

    return matrix.to(device, torch.float32, copy=matrix.is_inference())


def _through_linear(_: Any, x: Any, down: Any, up: Any) -> Any:
    import torch

    return torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)


def _through_convolution(module: Any, x: Any, down: Any, up: Any) -> Any:
    """The layer's own convolution with the first matrix, and at each place the second one."""
    import torch

    narrow = module._conv_forward(x, down.reshape(-1, module.in_channels, *module.kernel_size), None)
    channels = -1 - len(module.kernel_size)
    return torch.nn.functional.linear(narrow.movedim(channels, -1), up.flatten(1)).movedim(-1, channels)


def _is_convolution(module: Any) -> bool:
    import torch

    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, kinds) and module.groups == 1


def _is_no_linear_layer(module: Any) -> bool:
    import torch

    return isinstance(module, (torch.nn.modules.conv._ConvNd, torch.nn.Embedding))


def _is_plain(weight: Any) -> bool:
    import torch

    kinds = (torch.Tensor, torch.nn.Parameter)
    return type(weight) in kinds and weight.is_floating_point() and weight.element_size() >= 2


def _is_turned(module: Any, pair: _Pair) -> bool:
    """Whether the weight has a row per input: embeddings, and the Conv1D of transformers (GPT-2 and its relatives),
    which is a linear layer with a weight of (in, out). Where it is square its shape does not tell.
    """
    weight = module.weight
    is_conv1d = any(each.__name__ == "Conv1D" for each in type(module).__mro__)
    return pair.embedding or (is_conv1d and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1])


def _delta(pair: _Pair, weight: Any, turned: bool) -> Any:
    """The product of the matrices, in fp32, shaped like the weight."""
    down, up = (each.to(device=weight.device).float() for each in (pair.down, pair.up))
    if turned:
        return (up @ down).t()
    return (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def _check_shape(module: Any, pair: _Pair) -> None:
    down, up = pair.down, pair.up
    if up.shape[1] != down.shape[0]:
        raise InvalidArgumentError(f"{pair.keys}: ranks {up.shape[1]} and {down.shape[0]} differ")
    rows, columns = up.shape[0], down.flatten(1).shape[1]
    weight = module.weight
    wanted = (columns, rows) if _is_turned(module, pair) else (rows, columns)
    if _is_plain(weight) and wanted != (weight.shape[0], weight[0].numel()):
        raise InvalidArgumentError(
            f"{pair.keys}: the product of the matrices is {list(wanted)}, the weight is {list(weight.shape)}"
        )


# --- names ------------------------------------------------------------------------------------------------------


def _pairs(state: Mapping[str, Any]) -> dict[str, _Pair]:
    """Which matrices belong together, by the layer's name as the file has it."""
    found: dict[str, _Pair] = {}
    for key, value in state.items():
        if any(part in key for part in _BEYOND):
            raise UnsupportedError(
                f"{key!r} belongs to a variant of LoRA that cannot be applied (DoRA, LoHa, LoKr, Tucker)"
            )
        _sort_in(found, key, value)
    incomplete = [name for name, pair in found.items() if pair.down is None or pair.up is None]
    if incomplete or not found:
        raise InvalidArgumentError(
            f"no whole LoRA: {incomplete[0]!r} lacks one of its two matrices"
            if incomplete
            else "no LoRA: the state is empty"
        )
    return found


def _sort_in(found: dict[str, _Pair], key: str, value: Any) -> None:
    for pattern, slot in ((_DOWN, "down"), (_UP, "up"), (_ALPHA, "alpha"), (_EMBEDDING, None)):
        match = pattern.match(key)
        if match is None:
            continue
        pair = found.setdefault(match["target"], _Pair())
        pair.keys.append(key)
        pair.embedding |= slot is None
        which = slot or ("down" if match["which"] == "A" else "up")
        setattr(pair, which, float(value) if which == "alpha" else value.detach())
        return
    raise InvalidArgumentError(
        f"{key!r} is not a name of a LoRA that is understood (lora_A/lora_B, lora_down/lora_up, alpha)"
    )


def _target(modules: dict[str, Any], name: str) -> Any:
    """The submodule that a name means: without what wrappers put in front, and flat names by their parts."""
    flat = _FLAT.sub("", name)
    if flat != name:
        for each, module in modules.items():
            if each.replace(".", "_") == flat and hasattr(module, "weight"):
                return module
    parts = name.split(".")
    for start in range(len(parts)):
        module = modules.get(".".join(parts[start:]))
        if module is not None and getattr(module, "weight", None) is not None:
            return module
    raise InvalidArgumentError(f"the module has no layer for {name!r}")


def _read(path: str) -> dict[str, Any]:
    """The tensors of a safetensors file, in host memory."""
    import torch

    state = {}
    entries = read_header(path)
    with open(path, "rb") as file:
        for name, entry in entries.items():
            if entry.torch_dtype is None:
                raise UnsupportedError(f"{path}: tensor {name!r} has dtype {entry.dtype}, which PyTorch does not have")
            file.seek(entry.start)
            content = bytearray(file.read(entry.size))
            dtype = getattr(torch, entry.torch_dtype)
            empty = torch.empty(entry.shape, dtype=dtype)
            state[name] = torch.frombuffer(content, dtype=dtype).view(entry.shape) if entry.size else empty
    return state
