"""What hooks cost the calls that they pass on, or that are none of theirs: the same program with the libraries and without."""

from __future__ import annotations

from .child import call
from .figures import MIB, Figure
from .plan import Sizes
from .workshop import Workshop, built

NAMES = {
    "passthrough": "a hooked call that is passed on (cudaFree of no memory)",
    "runtime_pair": "cudaMalloc of 512 bytes and cudaFree outside regions",
    "other_call": "a call that is not hooked (cudaGetDevice)",
    "plain_lookup": "dlsym of a name that is not CUDA's",
    "other_lookup": "dlsym of a function of the driver's that is not hooked",
    "lookup": "dlsym of a hooked function",
    "driver_pair": "cuMemAlloc of 512 bytes and cuMemFree outside regions",
}


def hooks(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """In turns, a process per repetition: without Sire, and with both of its libraries."""
    driver = built("SIRE_DRIVER_SO", "libsire_driver.so")
    with_hooks = {"LD_PRELOAD": f"{driver} {shop.sire.library}"}
    times: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(max(sizes.repeats, 3)):
        for hooked in (number % 2 == 0, number % 2 == 1):
            lines = call(shop, "passthrough", str(sizes.calls), memory=256 * MIB, more=with_hooks if hooked else None)
            times[hooked].append({str(line["name"]): float(line["value"]) for line in lines})
    figures = []
    for name, what in NAMES.items():
        ours, without = ([run[name] for run in times[hooked]] for hooked in (True, False))
        figures.append(Figure(f"hook.{name}_ns", "ns", ours, without, notes=[f"{what}, with driver-level hooks; ceiling: without Sire; less is better"]))
    return figures
