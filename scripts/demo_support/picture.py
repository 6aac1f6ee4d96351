"""Draws device memory over time: `picture.py TURNS.json PICTURE.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB = 1 << 20


def main() -> int:
    turns = json.loads(Path(sys.argv[1]).read_text())
    seconds = [at for at, _ in turns["samples"]]
    used = [count / MIB for _, count in turns["samples"]]
    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    axes.fill_between(seconds, used, step="post", alpha=0.35, color="tab:blue")
    axes.step(seconds, used, where="post", color="tab:blue", linewidth=1.2)
    axes.axhline(turns["total"] / MIB, color="tab:red", linestyle="--", linewidth=1)
    axes.text(0, turns["total"] / MIB, " the device's memory", color="tab:red", va="bottom", fontsize=8)
    for at, label in turns["marks"]:
        axes.axvline(at, color="0.7", linewidth=0.6)
        axes.text(at, axes.get_ylim()[1] * 0.02, label, rotation=90, fontsize=7, va="bottom", ha="right", color="0.25")
    device = "software device" if turns["software"] else turns["device"]
    needed = sum(row["model_bytes"] for row in turns["rows"]) / MIB
    axes.set(
        xlabel="seconds",
        ylabel="physical device memory, MiB",
        title=f"{len(turns['rows'])} models, {needed:,.0f} MiB together, taking turns ({device}, hook mode {turns['hook_mode']})",
    )
    axes.set_ylim(0, turns["total"] / MIB * 1.12)
    figure.savefig(sys.argv[2], dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
