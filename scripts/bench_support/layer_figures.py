"""Models larger than the device, layer by layer and in slices; patches that are applied and reverted; what monitoring costs."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from .child import answering
from .figures import MIB, Figure, Target, Wrong, ways
from .plan import Sizes
from .serve_figures import accelerate, python
from .workshop import ROOT, Workshop

# What a device has for everything besides layers: PyTorch takes 20 MiB for the first tensors of some MiB.
BESIDE_MIB = 20
STRATEGIES = ("none", "active_only", "limit_gpu")


def setting(shop: Workshop, device_mib: int, more: Path | None) -> dict[str, str]:
    """The environment of a program with PyTorch."""
    environment = shop.environment(None, device_mib * MIB)
    environment.pop("LD_LIBRARY_PATH", None)
    folders = [str(ROOT / "python-shim" / "src"), *([] if more is None else [str(more)])]
    return environment | {"PYTHONPATH": os.pathsep.join(folders), "SIRE_LIBRARY": str(shop.sire.library), "SIRE_HOOK_MODE": "torch", "OMP_NUM_THREADS": "1"}


def right(result: dict[str, Any], what: str) -> dict[str, Any]:
    """The result, if no answer was wrong."""
    if result["wrong"]:
        raise Wrong(f"{what}: {result['wrong']} answers were wrong")
    return result


def one(shop: Workshop, interpreter: Path, device_mib: int, more: Path | None, *arguments: object, program: str = "layers.py") -> dict[str, Any]:
    """One process, one measurement."""
    what = f"{program} {' '.join(map(str, arguments))}"
    command = [str(interpreter), str(ROOT / "benches" / program), *map(str, arguments)]
    done = subprocess.run(command, env=setting(shop, device_mib, more), capture_output=True, text=True)
    if done.returncode != 0:
        raise Wrong(f"{what}: {done.stderr.strip()[-600:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return right(result, what)


def oversized(shop: Workshop, sizes: Sizes, offline: bool) -> list[Figure]:
    """Layers of two sizes."""
    interpreter = python()
    more = accelerate(interpreter, offline)
    return [oversized_by(shop, sizes, interpreter, more, mib) for mib in (max(4, sizes.served_mib // 4), max(8, sizes.served_mib))]


def oversized_by(shop: Workshop, sizes: Sizes, interpreter: Path, more: Path, mib: int) -> Figure:
    """Both ways in turns, a process each; and the same forward where nobody has to move anything."""
    seconds: dict[str, list[float]] = {"sire": [], "accelerate": [], "resident": []}
    with ExitStack() as stack:
        asks = {}
        for way in seconds:
            # PyTorch's own blocks for tensors of some MiB are larger than they.
            room = ((32 if way == "resident" else 8) * mib + BESIDE_MIB) * MIB
            environment = setting(shop, 0, more) | ({"SIRE_SIM_MEMORY": str(room)} if shop.software else {})
            command = [str(interpreter), str(ROOT / "benches" / "layers.py"), "oversized", way, "16", str(mib), "3"]
            asks[way] = stack.enter_context(answering(command, environment, f"layers.py oversized {way}"))
        for other_first in ways(sizes.repeats):
            turns = ("accelerate", "sire") if other_first else ("sire", "accelerate")
            for way in (*turns, "resident"):
                seconds[way].append(right(asks[way](""), f"layers.py oversized {way}")["seconds"])
    name = f"oversized.time_vs_sequential_offload.{mib}MiB"
    notes = [f"16 layers on a device for half of them and {BESIDE_MIB} MiB; less is better", beside_resident(seconds)]
    return Figure(name, "s", seconds["sire"], seconds["accelerate"], target=Target("ratio", at_most=1.0), notes=notes)


def beside_resident(seconds: dict[str, list[float]]) -> str:
    """What the forward takes of accelerate's time where all layers are on the device."""
    share = median(mine / other for mine, other in zip(seconds["resident"], seconds["accelerate"], strict=True))
    told = f"with all layers on the device {share:.2f} of accelerate's time"
    return f"{told}: out of reach here" if share > 1.0 else told


def slices(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """Each strategy, for one pass over all slices."""
    interpreter, repeats = python(), 1 if sizes.repeats <= 2 else 3
    count, mib = 8, max(4, sizes.served_mib // 4)
    runs = [one(shop, interpreter, count * mib, None, "slices", count, mib, 3) for _ in range(repeats)]
    return [Figure(f"slyce.{each}.time", "s", [run[each] for run in runs], notes=[f"{count} slices of {mib} MiB"]) for each in STRATEGIES]


def patches(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """One rebase between five stacks of LoRAs of rank 8 on a weight of 1 MiB; CPU time of a look at memory, as a share of the interval."""
    interpreter, repeats = python(), 1 if sizes.repeats <= 2 else 3
    runs = [one(shop, interpreter, 256, None, "patches", 200) for _ in range(repeats)]
    overhead = [run["overhead"] for run in runs]
    return [
        Figure("commits.rebase_us", "us", [run["us"] for run in runs], notes=["between LoRAs of rank 8 on a weight of 1 MiB"]),
        Figure("memory.monitor_overhead", "", overhead, target=Target("max", at_most=0.01)),
    ]


def overhead(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """Host memory of a managed model, as a multiple of its weights: of the program's own memory, and with a safetensors file that has them."""
    interpreter, repeats = python(), 1 if sizes.repeats <= 2 else 3
    mib = max(128, sizes.served * sizes.served_mib)
    found = {
        way: [float(one(shop, interpreter, 2 * mib, None, way, mib, program="overhead.py")["ratio"]) for _ in range(repeats)] for way in ("memory", "source")
    }
    note = f"anonymous memory of the process, {mib} MiB of weights"
    return [
        Figure("host.overhead", "", found["memory"], target=Target("max", at_most=1.05), notes=[note]),
        Figure("host.overhead.source", "", found["source"], target=Target("max", at_most=0.05), notes=[f"{note}, in a safetensors file"]),
    ]
