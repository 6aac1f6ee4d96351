"""Step `saver`: torch_memory_saver's interface by Sire, and beside it by that package where it is installed or in the bundle."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from .. import child
from ..context import Context
from ..report import Report


def run(context: Context, report: Report) -> None:
    """Sire's own run is checked; the peer's is reported."""
    if not context.torch:
        report.check("saver", False, "PyTorch is not there")
        return
    peer = (report.environment.get("python") or {}).get("packages", {}).get("torch_memory_saver") or version_in(carried(context))
    report.environment["peer"] = f"torch_memory_saver {peer}" if peer else "torch_memory_saver is not installed"
    for backup, retain in (("none", False), ("cpu", False), ("cpu", True), ("disk", False)):
        _one(context, report, "sire", backup, retain=retain)
        if peer:
            _one(context, report, "torch_memory_saver", backup, retain=retain)


def carried(context: Context) -> Path | None:
    """Where the bundle has the peer."""
    place = context.bundle / "peer" if context.bundle else None
    return place if place and place.is_dir() else None


def version_in(place: Path | None) -> str | None:
    """The peer's version there."""
    found = metadata.distributions(name="torch_memory_saver", path=[str(place)]) if place else ()
    return next((each.version for each in found), None)


def disk_directory(context: Context) -> Path:
    """The folder that both write to."""
    folder = context.scratch / "saver-disk"
    folder.mkdir(exist_ok=True)
    return folder


def _one(context: Context, report: Report, package: str, backup: str, *, retain: bool) -> None:
    size = (256 << 20) if context.software else (4 << 30)
    command = context.probe("saver", "--package", package, "--bytes", str(size), "--backup", backup)
    env = context.env(TMS_DISK_BACKUP_DIR=str(disk_directory(context)))
    if retain:
        env["TMS_RETAIN_CPU_BACKUP"] = "1"
    if package != "sire" and (place := carried(context)):
        # Behind the environment's own packages, which are preferred.
        env["PYTHONPATH"] = os.pathsep.join((env["PYTHONPATH"], str(place)))
    outcome = child.run([*command, *(["--retain"] if retain else [])], env=env, timeout=context.left(60))
    found = child.last_json(outcome.output)
    name = f"saver.{package}.{backup}" + ("+retain" if retain else "")
    if found is None:
        if package == "sire":
            report.check(name, False, outcome.tail(), outcome.seconds)
        else:
            report.answer(name, "Does the peer run here?", outcome.how(), {"output": outcome.tail()}, outcome.seconds)
        return
    report.take_figures(found["figures"])
    if package == "sire":
        slack = 0 if context.software else 32 << 20
        right = not found["wrong"] and not found["moved"] and min(found["given_back"]) >= size - slack
        detail = f"wrong {found['wrong'][:10]}, moved {found['moved']}, given back {found['given_back']}"
        report.check(name, right, "" if right else detail, outcome.seconds)
