"""Eight models take turns on a device that holds three: answers stay right, clean weights are never copied back.

python examples/sire_models.py torch
"""

from __future__ import annotations

import random

import sire
import torch
from common import check, fitting, hook_mode

sire.hook_mode = hook_mode()

COUNT, ROOM = 8, 3
torch.zeros(1, device="cuda")
each = fitting(256 << 20, share=0.5) // ROOM // (4 << 20) * (4 << 20)
sire.setup_default_pools(vram_limit=ROOM * each + (8 << 20), release="lazy")


class Scorer(torch.nn.Module):
    """Its answer depends on every weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(each // 4 // 1024, 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ x).square().mean()


with torch.no_grad():
    models = [Scorer(seed).eval() for seed in range(COUNT)]
    x = torch.ones(1024)
    expected = [float(model(x)) for model in models]
    chooser = random.Random(1)
    requests = chooser.choices(range(COUNT), [1 / (rank + 1) for rank in range(COUNT)], k=40)
    for index in requests:
        with sire.auto_manage(models[index]) as managed:
            answer = float(models[index](x.to(managed.get_execution_device())))
        if abs(answer - expected[index]) > 1e-3 * abs(expected[index]):
            check(False, f"model {index} answers {answer}, not {expected[index]}")

totals = sire.summary()["totals"]
check(totals["load"] + totals["hit"] == len(requests), f"{len(requests)} requests: {totals['hit']} found their model on the device")
check(totals["bytes_copied"] <= totals["load"] * (each + 1024), f"{totals['load']} loads copied {sire.format_size(totals['bytes_copied'])}, offloads nothing")
check(not any(model.weight.is_cuda for model in models), "afterwards all are on the host")
