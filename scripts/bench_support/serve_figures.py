"""More models than the device holds: a trace of requests served by Sire, by accelerate's offloading hooks, and by plain `.to()`, on one device."""

from __future__ import annotations

import os
import subprocess
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from .child import Ask, answering
from .figures import MIB, Figure, Target, Unmeasurable, Wrong
from .plan import Sizes
from .workshop import ROOT, Workshop, environments

KEPT = ROOT / ".sire" / "bench" / "accelerate"
PACKAGES = ("psutil", "pyyaml", "huggingface_hub", "safetensors", "packaging", "numpy")
WAYS = ("sire", "accelerate", "to")


def python() -> Path:
    """An interpreter with PyTorch on this machine's device: of this checkout, or named in SIRE_BENCH_PYTHON."""
    named = os.environ.get("SIRE_BENCH_PYTHON")
    found = [Path(named)] if named else [path / "bin" / "python" for path in environments() if (path / "bin" / "python").exists()]
    if not found:
        raise Unmeasurable("there is no environment with PyTorch in .sire; make one with 'sire software-env', or name one in SIRE_BENCH_PYTHON")
    return found[-1]


def accelerate(interpreter: Path, offline: bool) -> Path:
    """A folder that has accelerate, without another PyTorch."""
    if not (KEPT / "accelerate").is_dir():
        if offline:
            raise Unmeasurable("accelerate is not there, and --offline forbids to fetch it")
        pip = [str(interpreter), "-m", "pip", "install", "-q", "--target", str(KEPT)]
        for command in ([*pip, *PACKAGES], [*pip, "--no-deps", "accelerate"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise Unmeasurable(f"accelerate could not be fetched: {done.stderr.strip()[-300:]}")
    return KEPT


def process(shop: Workshop, interpreter: Path, way: str, sizes: Sizes, more: Path) -> AbstractContextManager[Ask]:
    """A process that serves the trace of each number that it is told."""
    arguments = [str(each) for each in (sizes.served, 3, sizes.served_mib, sizes.requests)]
    environment = shop.environment(None, (3 * (sizes.served_mib + 1) + 64) * MIB)
    # An environment of the software device finds its own libraries.
    environment.pop("LD_LIBRARY_PATH", None)
    environment |= {
        "PYTHONPATH": os.pathsep.join((str(ROOT / "python-shim" / "src"), str(more))),
        "SIRE_LIBRARY": str(shop.sire.library),
        "SIRE_HOOK_MODE": "torch",
        "OMP_NUM_THREADS": "1",
    }
    return answering([str(interpreter), str(ROOT / "benches" / "serve.py"), way, *arguments], environment, f"serve.py {way}")


def serve(shop: Workshop, sizes: Sizes, offline: bool) -> list[Figure]:
    """The three ways in turns, the same trace in each turn."""
    interpreter = python()
    more = accelerate(interpreter, offline)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        asks = {way: stack.enter_context(process(shop, interpreter, way, sizes, more)) for way in WAYS}
        for number in range(sizes.repeats):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                runs[way].append(asks[way](str(number)))
    wrong = [run["wrong"] for way in WAYS for run in runs[way]]
    if any(wrong):
        raise Wrong(f"serve: {sum(wrong)} answers were wrong")

    def series(way: str, what: str) -> list[float]:
        return [float(run[what]) for run in runs[way]]

    described = f"{sizes.served} models of {sizes.served_mib} MiB on a device for 3, {sizes.requests} requests (Zipf)"
    over = [max(0.0, run["peak"] - run["base"] - run["budget"]) for run in runs["sire"]]
    less = "less is better"
    return [
        Figure("serve.wrong_outputs", "", series("sire", "wrong"), target=Target("max", at_most=0), notes=[described]),
        Figure("serve.peak_over_budget_bytes", "B", over, target=Target("max", at_most=0)),
        Figure("serve.hit_rate", "", series("sire", "hits"), notes=["requests that found their model on the device"]),
        Figure("serve.bytes_vs_accelerate", "B", series("sire", "bytes"), series("accelerate", "bytes"), target=Target("ratio", at_most=0.5), notes=[less]),
        Figure("serve.time_vs_accelerate", "s", series("sire", "seconds"), series("accelerate", "seconds"), target=Target("ratio", at_most=1.0), notes=[less]),
        Figure("serve.time_vs_to", "s", series("sire", "seconds"), series("to", "seconds"), target=Target("ratio", at_most=1.0), notes=[less]),
    ]
