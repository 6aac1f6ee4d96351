"""The demo's measurements as a list of figures, in the form that all scripts share: a name, a value, a unit, and where
there is one the ceiling that was measured in the same process, with the share of it that was reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ROW_UNITS = {"before": "bytes", "resident": "bytes", "paused": "bytes", "resumed": "bytes", "max_difference_from_cpu": "1"}
# The other scenes: what they report, and its unit.
SCENE_UNITS = {
    "baseline": {"out_of_memory": "bool", "models": "1", "models_loaded": "1"},
    "contention": {"out_of_memory": "bool", "exact": "bool", "waited_seconds": "s"},
    "serving": {
        "requests": "1",
        "loads": "1",
        "bytes_copied": "bytes",
        "bytes_with_to": "bytes",
        "peak": "bytes",
        "room": "bytes",
        "exact": "bool",
    },
    "control": {"resident": "bytes", "paused": "bytes", "exact": "bool"},
    "control-contention": {"survived": "bool"},
}

Figure = dict[str, Any]


def figures(results: dict[str, dict[str, Any]]) -> list[Figure]:
    """All figures of the scenes that ran; a scene that died before it measured anything has none."""
    found: list[Figure] = []
    for name, result in results.items():
        common = {"samples": 1, "simulated": False, "device": result["device"]}
        for row in result.get("rows", []):
            found += [{"name": f"demo.{name}.{row['model']}.{key}", **figure, **common} for key, figure in of_row(row)]
        for key, unit in SCENE_UNITS.get(name.removesuffix("-preload"), {}).items():
            if key in result:
                found.append({"name": f"demo.{name}.{key}", **plain(result[key], unit), **common})
    return found


def plain(value: Any, unit: str) -> Figure:
    return {"value": int(value) if unit == "bool" else value, "unit": unit}


def of_row(row: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """One model's turns. Times are compared with a plain copy of the same bytes by one thread of the same process."""
    for key, unit in ROW_UNITS.items():
        yield key, plain(row[key], unit)
    for verb in ("pause", "resume"):
        seconds, copy = row[f"seconds_{verb}"], row["seconds_copy"]
        yield (
            f"seconds_{verb}",
            {
                "value": seconds,
                "unit": "s",
                "bytes": row["bytes_copied"],
                "ceiling": copy,
                "ratio": copy / seconds,
            },
        )
    yield "exact", plain(row["exact"] and row["same_addresses"], "bool")
