"""Scenes of the demo, one after the other in one process: `scenario.py FOLDER SCENE... [--sabotage KIND]`.

Scenes: `baseline` (no Sire: the models do not fit), `turns` (pause and resume in turn), `contention` (another process
takes the freed memory), `serving` (models come when they are asked), `control` and `control-contention` (the published torch-memory-saver on the same device).
Each writes what it saw into FOLDER as JSON; the process ends with 0 only if every scene saw what it is meant to show. The
control scenes only report. Scenes share a process where one goes on from the other, since importing takes longest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import Device, Sampler, copy_rate
from models import MODELS, Demo
from table import print_rows

MIB = 1 << 20
ROOM = 600 * MIB  # as much as the demo's software device has; of a larger device no more is used where it is about too little
SLACK = 24 * MIB  # what PyTorch's default pool may hold beside the regions: activations, rounding


class Unmet(Exception):
    """Something that the demo promises did not hold."""


def require(condition: bool, promise: str) -> None:
    if not condition:
        raise Unmet(promise)


def say(text: str) -> None:
    print(f"    {text}", flush=True)


def mib(count: float) -> str:
    return f"{count / MIB:,.0f} MiB"


def held(device: Device) -> int:
    """Device bytes in use by the strictest count there is."""
    blocks = device.blocks()
    return device.used() if blocks is None else max(blocks, device.used())


class Stage:
    """What the scenes of a process share: the device, and the models with what they have answered so far."""

    def __init__(self, out: Path, sabotage: str | None) -> None:
        self.out, self.sabotage = out, sabotage
        self.device = Device()
        self.outputs: dict[str, torch.Tensor] = {}
        self._models: dict[str, Demo] = {}

    def model(self, name: str) -> Demo:
        if name not in self._models:
            self._models[name] = MODELS[name]()
        return self._models[name]

    def models(self) -> list[Demo]:
        """All of them; one is enough to see that something is broken."""
        return [self.model(name) for name in MODELS][: 1 if self.sabotage else None]

    def write(self, scene: str, result: dict[str, Any]) -> None:
        mode = os.environ.get("SIRE_HOOK_MODE")
        name = f"{scene}-{mode}" if scene in ("turns", "contention") else scene
        common = {"device": torch.cuda.get_device_name(0), "software": self.device.software}
        (self.out / f"{name}.json").write_text(json.dumps(result | common))


def baseline(stage: Stage) -> dict[str, Any]:
    """All models at once, plain PyTorch: out of memory is what must happen, if need be by PyTorch's own limit."""
    require("libsire_alloc" not in Path("/proc/self/maps").read_text(), "Sire is not even loaded")
    loaded: list[str] = []
    models = stage.models()
    total = stage.device.free_and_total()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, ROOM / total))
    try:
        for model in models:
            model.module.to("cuda")
            loaded.append(model.name)
    except torch.OutOfMemoryError as error:
        say(f"after {', '.join(loaded)}: OutOfMemoryError: {str(error).splitlines()[0][:120]}")
    else:
        raise Unmet("the models together do not fit on the device, so that there is something to show")
    for model in models:
        model.module.to("cpu")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"out_of_memory": True, "models": len(models), "models_loaded": len(loaded)}


def load(model: Demo) -> None:
    import sire

    with sire.region(model.name, backup="cpu"):
        model.module.to("cuda")


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def first_turn(model: Demo, device: Device, sampler: Sampler) -> dict[str, Any]:
    """Loads, runs and pauses `model`; the row of the table so far."""
    import sire

    reference = model.run("cpu")
    idle = held(device)
    sampler.mark(f"load {model.name}")
    load(model)
    output = model.run("cuda")
    torch.cuda.empty_cache()
    resident = held(device)
    sampler.mark(f"pause {model.name}")
    started = time.perf_counter()
    report = sire.pause(model.name)
    seconds = time.perf_counter() - started
    paused = held(device)
    require(resident - idle >= model.bytes(), f"{model.name}: its bytes are on the device while it is resident")
    require(paused - idle <= SLACK, f"{model.name}: its physical memory is back with the {witness(device)} while it is paused")
    require(report.bytes_copied >= model.bytes(), f"{model.name}: the report says that its bytes were backed up")
    return {
        "model": model.name,
        "model_bytes": model.bytes(),
        "before": idle,
        "resident": resident,
        "paused": paused,
        "seconds_pause": seconds,
        "bytes_copied": report.bytes_copied,
        "seconds_copy": report.bytes_copied / copy_rate(),
        "max_difference_from_cpu": difference(output, reference),
        "addresses": model.addresses(),
        "output": output,
    }


def witness(device: Device) -> str:
    return "kernel, by st_blocks of the device's memfd," if device.software else "driver"


def second_turn(model: Demo, row: dict[str, Any], device: Device, sampler: Sampler, sabotage: str | None) -> None:
    """Resumes, runs and pauses `model` again, and compares with the first turn."""
    import sire

    sampler.mark(f"resume {model.name}")
    started = time.perf_counter()
    sire.resume(model.name)
    row["seconds_resume"] = time.perf_counter() - started
    row["resumed"] = held(device)
    if sabotage == "move-address":
        for parameter in model.module.parameters():
            parameter.data = parameter.data.clone()
    row["same_addresses"] = model.addresses() == row["addresses"]
    row["exact"] = bool(torch.equal(model.run("cuda"), row["output"]))
    torch.cuda.empty_cache()
    sire.pause(model.name)
    require(row["same_addresses"], f"{model.name}: every tensor has the address it had before")
    require(row["exact"], f"{model.name}: the output after resume is bit-identical to the output before pause")
    require(row["max_difference_from_cpu"] <= 2e-3, f"{model.name}: the output agrees with the CPU's")


def turns(stage: Stage) -> dict[str, Any]:
    """Models that do not fit together take turns."""
    import sire

    device, models = stage.device, stage.models()
    for command in device.where_to_look():
        say(f"look from another terminal: {command}")
    with Sampler(device) as sampler:
        rows = [first_turn(model, device, sampler) for model in models]
        for model, row in zip(models, rows, strict=True):
            second_turn(model, row, device, sampler, stage.sabotage)
    for row in rows:
        row["address"] = hex(row["addresses"][0])
        stage.outputs[row["model"]] = row.pop("output")
        del row["addresses"]
    print_rows(rows)
    return {
        "hook_mode": sire.hook_mode,
        "rows": rows,
        "samples": sampler.samples,
        "marks": sampler.marks,
        "total": device.free_and_total()[1],
        "stats": sire.stats(),
    }


# As users ask: one model much more often than the last. The first three requests bring each there once.
REQUESTS = (0, 1, 2, 0, 0, 1, 0, 0, 2, 0, 1, 1, 0, 0)


def serving(stage: Stage) -> dict[str, Any]:
    """The same models, and nobody says pause or resume: each comes when it is asked, and makes way when another needs the memory."""
    import sire

    models = stage.models()
    references = [model.run("cpu") for model in models]
    room, idle = min(ROOM, stage.device.free_and_total()[1]), held(stage.device)
    sire.setup_default_pools(release="lazy", vram_limit=room - idle - SLACK if room < stage.device.free_and_total()[1] else None, headroom=SLACK)
    wrappers = [sire.manage(model.module) for model in models]
    peak, loads = 0, 0
    first: dict[int, torch.Tensor] = {}
    for at in REQUESTS:
        before = sire.summary()["totals"]["bytes_copied"]
        with sire.auto_manage(wrappers[at]) as wrapper:
            output = models[at].run(str(wrapper.get_execution_device()))
        peak = max(peak, held(stage.device))
        loads += sire.summary()["totals"]["bytes_copied"] > before
        name = models[at].name
        require(difference(output, references[at]) <= 2e-3, f"{name}: the answer agrees with the CPU's")
        require(torch.equal(output, first.setdefault(at, output)), f"{name}: every answer is bit-identical to its first")
    copied = sire.summary()["totals"]["bytes_copied"]
    moved = sum(2 * models[at].bytes() for at in REQUESTS)
    require(sum(model.bytes() for model in models) > room, "the models together do not fit")
    require(peak - idle <= room, "the room was enough at every moment")
    require(loads < len(REQUESTS), "a model that is still there is not copied again")
    require(copied <= moved / 2, "no weight was copied back from the device: at most half of what .to('cuda') and .to('cpu') move")
    say(f"{len(REQUESTS)} requests for {len(models)} models, every answer right; {len(REQUESTS) - loads} found their model on the device")
    say(f"copied: {mib(copied)}, with .to('cuda') and .to('cpu') around each: {mib(moved)}; at most {mib(peak - idle)} of {mib(room)} in use")
    return {"requests": len(REQUESTS), "loads": loads, "bytes_copied": copied, "bytes_with_to": moved, "peak": peak - idle, "room": room, "exact": True}


def occupant(device: Device, leave: int, *extra: str) -> subprocess.Popen[str]:
    """Starts the process that takes the free memory but `leave` bytes; returns when it holds it."""
    here = Path(__file__).with_name("occupant.py")
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    process = subprocess.Popen(
        [sys.executable, str(here), device.runtime_path, str(leave), *extra],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    say(f"another process (pid {process.pid}) now holds {mib(int(process.stdout.readline()))} of the device")
    return process


def contention(stage: Stage) -> dict[str, Any]:
    """While a model is paused somebody else takes the memory: resume fails cleanly, keeps the backup, and works later.

    Goes on from `turns`, which leaves every model paused.
    """
    import sire

    device, model = stage.device, stage.model("gpt2")
    output = stage.outputs[model.name]
    other = occupant(device, 32 * MIB)
    try:
        sire.resume(model.name)
    except torch.OutOfMemoryError as error:
        message = str(error)
        say(f"resume: {type(error).__name__}: {message[:160]}")
    else:
        raise Unmet("resume reports out of memory while another process holds it")
    other.communicate("")
    require(other.returncode == 0, "the other process ends well")
    sire.resume(model.name)
    require(torch.equal(model.run("cuda"), output), "after the memory is free again resume brings every byte back")
    sire.pause(model.name)
    leaving = occupant(device, 32 * MIB, "1.0")
    started = time.perf_counter()
    sire.resume(model.name, wait=30.0)
    waited = time.perf_counter() - started
    leaving.wait()
    require(torch.equal(model.run("cuda"), output), "resume(wait=...) brings every byte back once the memory is free")
    say(f"resume(wait=30) waited {waited:.2f} s for the other process to leave, then every byte was back")
    return {"message": message, "out_of_memory": True, "waited_seconds": waited, "exact": True}


def control(stage: Stage) -> dict[str, Any]:
    """The published torch-memory-saver, same device: the software device did not invent pause and resume."""
    from torch_memory_saver import torch_memory_saver as saver

    saver.hook_mode = "torch"
    model = stage.model("all-minilm-l6-v2")
    with saver.region(enable_cpu_backup=True):
        model.module.to("cuda")
    output = model.run("cuda")
    torch.cuda.empty_cache()
    before = held(stage.device)
    saver.pause()
    paused = held(stage.device)
    saver.resume()
    same = torch.equal(model.run("cuda"), output)
    say(f"torch-memory-saver: {mib(before)} resident, {mib(paused)} paused, identical after resume: {same}")
    return {"resident": before, "paused": paused, "exact": same}


def control_contention(stage: Stage) -> dict[str, Any]:
    """The same, with the memory taken: whatever happens is the result. Should this process end in resume, that is it."""
    from torch_memory_saver import torch_memory_saver as saver

    torch.cuda.empty_cache()
    saver.pause()
    other = occupant(stage.device, 16 * MIB)
    print("RESUMING", flush=True)
    stage.write("control-contention", {"survived": False})
    try:
        saver.resume()
    except Exception as error:
        say(f"torch-memory-saver: {type(error).__name__}: {error}")
    other.communicate("")
    return {"survived": True}


HOW = {"preload": "LD_PRELOAD=libsire_alloc.so", "torch": "PyTorch's own pluggable allocator"}
SCENES = {
    "baseline": (baseline, "Without Sire: three models on a device that holds one"),
    "turns": (turns, "With Sire, hook mode {mode} ({how}): the models take turns"),
    "contention": (contention, "While a model is paused another process takes its memory"),
    "serving": (serving, "Nobody says pause or resume: sire.auto_manage serves more models than the device holds"),
    "control": (control, "Control: the published torch-memory-saver on the same device"),
    "control-contention": (control_contention, "Control: torch-memory-saver, resume while the memory is taken"),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("scenes", nargs="+", choices=SCENES)
    parser.add_argument("--sabotage")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.cuda.init()
    stage = Stage(options.out, options.sabotage)
    mode = os.environ.get("SIRE_HOOK_MODE", "")
    for name in options.scenes:
        play, title = SCENES[name]
        print(f"\n== {title.format(mode=mode, how=HOW.get(mode))}", flush=True)
        try:
            stage.write(name, play(stage))
        except Unmet as unmet:
            print(f"    NOT SHOWN: {unmet}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
