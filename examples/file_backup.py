"""Weights that a safetensors file holds already need no other backup: no copy, and no host memory.

python examples/file_backup.py preload|torch
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import check, fitting, hook_mode, show

MODE = hook_mode()

import sire  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main(folder: str) -> None:
    sire.hook_mode = MODE
    path = Path(folder, "model.safetensors")
    width = int((fitting(400_000_000) / 4 / 2) ** 0.5) // 64 * 64
    with sire.region("weights", backup="file", immutable=True):
        model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width)).to("cuda")
    # A program would have loaded the model from this file.
    save_file(model.state_dict(), path)
    expected = [each.cpu() for each in model.parameters()]
    addresses = [each.data_ptr() for each in model.parameters()]
    full = show("the model is there")

    print(sire.file_backup(model, path))
    report = sire.pause("weights")
    print(report)
    size = path.stat().st_size
    check(full - show("paused") >= size * 9 // 10, "the pause released the weights")
    check(report.bytes_copied == 0, "nothing was copied: the file holds them, byte for byte")
    [host] = [tier["used_bytes"] for tier in sire.stats()["tiers"] if tier["tier"] == "host"]
    check(host == 0, "no host memory holds a backup")

    print(sire.resume("weights"))
    show("resumed")
    check([each.data_ptr() for each in model.parameters()] == addresses, "same addresses")
    same = all(torch.equal(one.cpu(), two) for one, two in zip(model.parameters(), expected, strict=True))
    check(same, "same bytes, read from the file")

    with torch.no_grad():
        model[0].bias.add_(1)
    sire.changed(model[0].bias)
    changed = model[0].bias.cpu()
    report = sire.pause("weights")
    check(report.bytes_copied == changed.numel() * 4, "what was trained since is copied, and nothing else")
    sire.resume("weights")
    check(torch.equal(model[0].bias.cpu(), changed), "and comes back")


with tempfile.TemporaryDirectory() as folder:
    main(folder)
