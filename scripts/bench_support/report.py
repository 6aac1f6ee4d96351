"""The figures as a Markdown table."""

from __future__ import annotations

from statistics import median

from .figures import Figure

VERDICT = {True: "yes", False: "**no**", None: ""}


def number(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def row(figure: Figure) -> list[str]:
    spread = f"{number(figure.min)} … {number(figure.max)}" if len(figure.values) > 1 else ""
    ceiling = number(median(figure.ceilings)) if figure.ceilings else ""
    ratios = f"{number(min(figure.ratios))} … {number(max(figure.ratios))}" if figure.ratios else ""
    verdict = "not judged" if figure.target and figure.meaningless else VERDICT[figure.met]
    told = [*(f"not judged: {why}" for why in figure.meaningless), *figure.notes]
    target = str(figure.target) if figure.target else ""
    value = f"{number(figure.value)} {figure.unit}"
    return [f"`{figure.name}`", value, spread, ceiling, number(figure.ratio), ratios, target, verdict, "; ".join(told)]


HEAD = ["figure", "median", "min … max", "ceiling or peer", "ratio", "its min … max", "target", "met", "notes"]


def table(figures: list[Figure], missing: dict[str, str]) -> str:
    """All figures, and what could not be measured."""
    rows = [HEAD, ["---"] * len(HEAD), *(row(figure) for figure in figures)]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines += ["", *(f"Not measured: {name}: {why}" for name, why in missing.items())] if missing else []
    return "\n".join(lines)
