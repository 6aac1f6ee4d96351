"""The ratios as a picture: a line per figure, its median and spread, and the line that it must reach. Needs matplotlib."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .figures import Figure

COLOURS = {True: "tab:green", False: "tab:red", None: "0.6"}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def draw(figures: list[Figure], device: str, target: Path) -> None:
    """Writes the PNG; raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [figure for figure in figures if figure.ratios]
    picture, axes = plt.subplots(figsize=(9, 1.6 + 0.34 * len(shown)), layout="constrained")
    lowest, highest = 0.5, 2.0
    for place, figure in enumerate(reversed(shown)):
        ratio, ratios = figure.ratio or 0.0, figure.ratios or [0.0]
        lowest, highest = min(lowest, min(ratios)), max(highest, max(ratios))
        colour = COLOURS[figure.met]
        axes.plot([min(ratios), max(ratios)], [place, place], color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")
        axes.plot([ratio], [place], "o", color=colour, markersize=6)
        goal = figure.target
        if goal and goal.of == "ratio":
            bound = goal.at_least if goal.at_least is not None else goal.at_most
            axes.plot([bound, bound], [place - 0.35, place + 0.35], color="black", linewidth=1.4)
        axes.annotate(f"{ratio:.2f}", (ratio, place), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yticks(range(len(shown)), [figure.name for figure in reversed(shown)], fontsize=8)
    axes.set_ylim(-0.7, len(shown) - 0.2)
    axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(lowest / 1.2, highest * 1.2)
    ticks = [tick for tick in TICKS if lowest / 1.2 <= tick <= highest * 1.2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        "share of the ceiling, or times the peer\n(dot: median; bar: min … max; black: target; green: met, red: not met, grey: not judged)", fontsize=8
    )
    axes.set_title(textwrap.fill(device, 110), fontsize=8)
    picture.savefig(target, dpi=110)
    plt.close(picture)
