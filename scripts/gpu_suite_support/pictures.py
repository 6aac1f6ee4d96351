"""The result as pictures, where matplotlib is installed: shares of the ceiling, rates by piece size, and costs of virtual-memory calls.

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
    pictures = {"shares": shares, "pieces": pieces, "vmm": calls}
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
