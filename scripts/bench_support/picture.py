"""The ratios as a picture: a bar per figure, its spread, and the line that it must reach. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from .figures import Figure

COLOURS = {True: "tab:green", False: "tab:red", None: "0.6"}


def draw(figures: list[Figure], device: str, target: Path) -> None:
    """Writes the PNG; raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [figure for figure in figures if figure.ratios]
    picture, axes = plt.subplots(figsize=(9, 1 + 0.38 * len(shown)), layout="constrained")
    for place, figure in enumerate(reversed(shown)):
        ratio, ratios = figure.ratio or 0.0, figure.ratios or [0.0]
        spread = [[ratio - min(ratios)], [max(ratios) - ratio]]
        axes.barh(place, ratio, color=COLOURS[figure.met], xerr=spread, ecolor="0.2", capsize=2, height=0.7)
        goal = figure.target
        if goal and goal.of == "ratio":
            bound = goal.at_least if goal.at_least is not None else goal.at_most
            axes.plot([bound, bound], [place - 0.4, place + 0.4], color="black", linewidth=1.6)
        axes.text(max(ratios) * 1.06, place, f"{ratio:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [figure.name for figure in reversed(shown)], fontsize=8)
    axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("share of the ceiling, or times the peer (bar: median; whisker: min … max; black: target; grey: not judged)")
    axes.set_title(device, fontsize=9)
    picture.savefig(target, dpi=110)
    plt.close(picture)
