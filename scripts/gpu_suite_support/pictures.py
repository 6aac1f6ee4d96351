"""The result as pictures, where matplotlib is installed: shares of the ceiling, where the time goes, rates by piece size, costs of
virtual-memory calls, and a switch over time.

python -m gpu_suite_support.pictures RESULT.json      # draws a result that came from another machine
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

Figures = list[dict[str, Any]]


def draw(result: dict[str, Any], beside: Path) -> list[str]:
    """Writes PNGs beside the result; returns their paths, none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    title = f"{result['device']} device, {(result['environment'].get('gpu') or {}).get('name', 'no GPU')}"
    figures = result["figures"]
    pictures = {"shares": shares, "parts": parts, "pieces": pieces, "vmm": calls, "switch": switch}
    return [path for name, one in pictures.items() if (path := one(figures, title, beside.with_name(f"{beside.stem}.{name}.png")))]


def shares(figures: Figures, title: str, target: Path) -> str:
    """A bar per pause and resume: its share of the plain copy."""
    import matplotlib.pyplot as plt

    shown = [figure for figure in figures if figure.get("ratio") and figure["name"].startswith(("kit.pause", "kit.resume", "kit.disk"))]
    if not shown:
        return ""
    picture, axes = plt.subplots(figsize=(9, 1.5 + 0.25 * len(shown)), layout="constrained")
    names = [figure["name"].removeprefix("kit.") for figure in reversed(shown)]
    colours = ["tab:grey" if ".serial" in name else "tab:blue" if name.startswith("pause") else "tab:green" for name in names]
    axes.barh(names, [figure["ratio"] for figure in reversed(shown)], color=colours)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("share of a plain pinned copy of the same bytes (grey: what others do)")
    return save(picture, axes, title, target)


def parts(figures: Figures, title: str, target: Path) -> str:
    """A stacked bar per warm pause and resume: what its seconds went to. The mark is the plain copy of as many bytes."""
    import matplotlib.pyplot as plt

    shown = [figure for figure in figures if figure.get("parts") and figure["name"].endswith(".warm")]
    if not shown:
        return ""
    picture, axes = plt.subplots(figsize=(9, 1.5 + 0.25 * len(shown)), layout="constrained")
    names = [figure["name"].removeprefix("kit.").removesuffix(".warm") for figure in reversed(shown)]
    ends = [0.0] * len(shown)
    for part in sorted({part for figure in shown for part in figure["parts"]}):
        lengths = [figure["parts"].get(part, 0.0) for figure in reversed(shown)]
        axes.barh(names, lengths, left=ends, label=part)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    plain = [(figure["bytes"] / figure["ceiling"] / 1e9, name) for figure, name in zip(reversed(shown), names, strict=True) if figure.get("ceiling")]
    if plain:
        axes.plot(*zip(*plain, strict=True), "k|", markersize=9, label="plain copy")
    axes.margins(y=0.01)
    axes.set_xlabel("seconds, last cycle")
    axes.legend(fontsize=7)
    return save(picture, axes, title, target)


def switch(figures: Figures, title: str, target: Path) -> str:
    """A switch over time: what the device has free, and, dashed, what of the second model can be used."""
    import matplotlib.pyplot as plt

    found = [(match[1], match[2], figure) for figure in figures if (match := re.fullmatch(r"kit\.switch\.(\w+)\.(\w+)\.timeline", figure["name"]))]
    kinds = sorted({kind for _, kind, _ in found}, reverse=True)
    if not found:
        return ""
    picture, rows = plt.subplots(len(kinds), figsize=(8, 3 * len(kinds)), layout="constrained", squeeze=False)
    for axes, kind in zip(rows[:, 0], kinds, strict=True):
        for way, figure in ((way, figure) for way, of, figure in found if of == kind):
            at, free, ready = zip(*figure["milliseconds_free_ready"], strict=True)
            (line,) = axes.plot(at, free, label=f"{way}: free")
            if any(ready):
                axes.plot(at, ready, "--", color=line.get_color(), label=f"{way}: can be used")
        axes.set_ylabel(f"{kind}, MiB")
        axes.legend(fontsize=7)
    rows[-1, 0].set_xlabel("milliseconds")
    return save(picture, rows[0, 0], title, target)


def pieces(figures: Figures, title: str, target: Path) -> str:
    """The link by size of the piece."""
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way in ("to_host", "to_device"):
        found = [(int(match[1]), figure["value"]) for figure in figures if (match := re.fullmatch(rf"limit\.{way}\.(\d+)KiB", figure["name"]))]
        if found:
            axes.plot(*zip(*sorted(found), strict=True), marker="o", label=way)
    if not axes.lines:
        return ""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("piece, KiB")
    axes.set_ylabel("GB/s")
    axes.legend()
    return save(picture, axes, title, target)


def calls(figures: Figures, title: str, target: Path) -> str:
    """Microseconds per virtual-memory call by size."""
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for verb in ("create", "map", "access", "unmap", "release"):
        found = [(int(match[1]), figure["value"]) for figure in figures if (match := re.fullmatch(rf"vmm\.kit\.{verb}\.(\d+)MiB", figure["name"]))]
        if found:
            axes.plot(*zip(*sorted(found), strict=True), marker="o", label=verb)
    if not axes.lines:
        return ""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("physical, MiB")
    axes.set_ylabel("microseconds per call (median)")
    axes.legend()
    return save(picture, axes, title, target)


def save(picture: Any, axes: Any, title: str, target: Path) -> str:
    """Writes and closes."""
    import matplotlib.pyplot as plt

    axes.set_title(title, fontsize=9)
    picture.savefig(target, dpi=110)
    plt.close(picture)
    return str(target)


if __name__ == "__main__":
    named = Path(sys.argv[1])
    print("\n".join(draw(json.loads(named.read_text()), named)))
