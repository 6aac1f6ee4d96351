"""Step `environment`: what the machine, the driver, PyTorch and the library are; finds the runtime for the steps
after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from .. import child, elf
from ..context import Context
from ..report import Report

_SMI = (
    "name",
    "driver_version",
    "pci.bus_id",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.mem",
    "power.limit",
    "compute_mode",
    "mig.mode.current",
    "persistence_mode",
    "ecc.mode.current",
)


def run(context: Context, report: Report) -> None:
    """Fills `report.environment`."""
    report.environment |= {"machine": _machine(), "library": _library(context), "tools": _tools(context)}
    if not context.software:
        report.environment["gpu"] = _gpu(context)
    machine = child.run(context.probe("machine"), env=context.env(), timeout=context.left(120))
    facts = child.last_json(machine.output) or {"error": machine.tail()}
    report.environment["python"] = facts
    context.torch = str(facts.get("torch", ""))
    context.runtime = context.runtime or str(facts.get("runtime") or _runtime_without_torch(context))
    report.environment["runtime"] = context.runtime
    report.check(
        "environment.pytorch_sees_the_device",
        facts.get("cuda_available") is True,
        str(facts.get("torch_error") or facts.get("error") or facts.get("devices")),
        machine.seconds,
    )
    _identity(context, report)
    _doctor(context, report)


def _machine() -> dict[str, Any]:
    def read(path: str) -> str | None:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return None

    model = next(
        (line.split(":", 1)[1].strip() for line in (read("/proc/cpuinfo") or "").splitlines() if line.startswith("model name")),
        None,
    )
    memory = next((line.split()[1] for line in (read("/proc/meminfo") or "").splitlines() if line.startswith("MemTotal")), "0")
    return {
        "system": platform.platform(),
        "kernel": platform.release(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_bytes": int(memory) * 1024,
        "transparent_huge_pages": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "numa_nodes": read("/sys/devices/system/node/online"),
        "memory_limit": read("/sys/fs/cgroup/memory.max"),
        "driver_module": read("/proc/driver/nvidia/version"),
        "glibc": " ".join(platform.libc_ver()),
    }


def _library(context: Context) -> dict[str, Any]:
    if not context.library.exists():
        return {"path": str(context.library), "missing": True}
    return {
        "path": context.library.name,
        "bytes": context.library.stat().st_size,
        "sha256": hashlib.sha256(context.library.read_bytes()).hexdigest(),
        "needed": elf.needed(context.library),
        "newest_glibc": elf.newest_glibc(context.library),
    }


def _tools(context: Context) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for tool, argument in (("cc", "--version"), ("nvcc", "--version"), ("git", "--version")):
        if shutil.which(tool) is None:
            found[tool] = None
            continue
        outcome = child.run([tool, argument], env=context.env(), timeout=20)
        found[tool] = outcome.output.strip().splitlines()[-1 if tool == "nvcc" else 0] if outcome.output.strip() else outcome.how()
    return found


def _gpu(context: Context) -> dict[str, Any]:
    """What nvidia-smi says; fields that this driver does not know are asked for one by one and left out."""
    found: dict[str, Any] = {}
    for field in _SMI:
        outcome = child.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"],
            env=context.env(),
            timeout=30,
        )
        if outcome.ok:
            found[field] = outcome.output.strip()
    return found


def _runtime_without_torch(context: Context) -> str:
    """A CUDA runtime where PyTorch did not load one: the stand-in's, or the toolkit's."""
    places = [context.stand_in] if context.stand_in else []
    places += [Path("/usr/local/cuda/lib64"), Path("/usr/lib/x86_64-linux-gnu")]
    for place in places:
        for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
            if (place / name).exists():
                return str(place / name)
    return ""


def _identity(context: Context, report: Report) -> None:
    """Loads the library in a process of its own and asks who it is."""
    script = "import json, sys; from gpu_suite_support.probes.sire_c import Sire; print(json.dumps(Sire(sys.argv[1]).identity()))"
    outcome = child.run([context.python, "-c", script, str(context.library)], env=context.env(), timeout=context.left(30))
    found = child.last_json(outcome.output)
    if found is not None:
        report.environment["library"] |= found
    report.check("environment.library_loads", found is not None, "" if found else outcome.tail(), outcome.seconds)
    needs_cuda = [name for name in elf.needed(context.library) if "cuda" in name or "nvidia" in name] if context.library.exists() else []
    report.check("environment.library_needs_no_cuda", context.library.exists() and not needs_cuda, f"NEEDED: {needs_cuda}")
    harmless = child.run(["/bin/true"], env=context.env(preload=True), timeout=20)
    report.check(
        "environment.preload_harmless_in_bin_true",
        harmless.ok and not harmless.output.strip(),
        harmless.tail(),
        harmless.seconds,
    )


def _doctor(context: Context, report: Report) -> None:
    sire = context.find("sire")
    if sire is None:
        report.environment["doctor"] = "no `sire` binary beside the library or in the bundle"
        return
    outcome = child.run([str(sire), "doctor", "--json"], env=context.env(), timeout=context.left(60))
    try:
        report.environment["doctor"] = json.loads(outcome.output)
    except json.JSONDecodeError:
        report.environment["doctor"] = child.last_json(outcome.output) or outcome.tail()
