"""One scene of the demo, in a process of its own: `scenario.py SCENE OUT.json [--sabotage KIND]`.

Scenes: `baseline` (no Sire: the models do not fit), `turns` (pause and resume in turn), `contention` (another process
takes the freed memory), `control` and `control-contention` (the published torch-memory-saver on the same device).
Each writes what it saw as JSON, and exits 0 only if what it saw is what it is meant to show; the control scenes only report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import Device, Sampler, copy_seconds
from models import Demo, all_models, gpt2, minilm

MIB = 1 << 20
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


def baseline(device: Device, _: argparse.Namespace) -> dict[str, Any]:
    """All models at once, plain PyTorch: out of memory is what must happen."""
    loaded: list[str] = []
    models = all_models()
    try:
        for model in models:
            model.module.to("cuda")
            loaded.append(model.name)
    except torch.OutOfMemoryError as error:
        say(f"after {', '.join(loaded)}: OutOfMemoryError: {str(error).splitlines()[0][:120]}")
        return {"out_of_memory": True, "models": len(models), "models_loaded": len(loaded)}
    raise Unmet("the models together do not fit on the device, so that there is something to show")


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
        "model": model.name, "model_bytes": model.bytes(), "before": idle, "resident": resident, "paused": paused,
        "seconds_pause": seconds, "bytes_copied": report.bytes_copied,
        "seconds_copy": copy_seconds(report.bytes_copied), "max_difference_from_cpu": difference(output, reference),
        "addresses": model.addresses(), "output": output,
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


def turns(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """Models that do not fit together take turns."""
    import sire

    models = all_models()
    for command in device.where_to_look():
        say(f"look from another terminal: {command}")
    with Sampler(device) as sampler:
        rows = [first_turn(model, device, sampler) for model in models]
        for model, row in zip(models, rows, strict=True):
            second_turn(model, row, device, sampler, options.sabotage)
    for row in rows:
        row["address"] = hex(row["addresses"][0])
        del row["addresses"], row["output"]
    return {
        "hook_mode": sire.hook_mode, "rows": rows, "samples": sampler.samples, "marks": sampler.marks,
        "total": device.free_and_total()[1], "stats": sire.stats(),
    }


def occupant(device: Device, leave: int, *extra: str) -> subprocess.Popen[str]:
    """Starts the process that takes the free memory but `leave` bytes; returns when it holds it."""
    here = Path(__file__).with_name("occupant.py")
    environment = {k: v for k, v in __import__("os").environ.items() if k != "LD_PRELOAD"}
    process = subprocess.Popen(
        [sys.executable, str(here), device.runtime_path, str(leave), *extra],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )
    assert process.stdout is not None
    say(f"another process (pid {process.pid}) now holds {mib(int(process.stdout.readline()))} of the device")
    return process


def contention(device: Device, _: argparse.Namespace) -> dict[str, Any]:
    """While a model is paused somebody else takes the memory: resume fails cleanly, keeps the backup, and works later."""
    import sire

    model = gpt2()
    load(model)
    output = model.run("cuda")
    torch.cuda.empty_cache()
    sire.pause(model.name)
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


def saver_model() -> tuple[Any, Demo, torch.Tensor]:
    from torch_memory_saver import torch_memory_saver as saver

    saver.hook_mode = "torch"
    model = minilm()
    with saver.region(enable_cpu_backup=True):
        model.module.to("cuda")
    return saver, model, model.run("cuda")


def control(device: Device, _: argparse.Namespace) -> dict[str, Any]:
    """The published torch-memory-saver, same device: the software device did not invent pause and resume."""
    saver, model, output = saver_model()
    torch.cuda.empty_cache()
    before = held(device)
    saver.pause()
    paused = held(device)
    saver.resume()
    same = torch.equal(model.run("cuda"), output)
    say(f"torch-memory-saver: {mib(before)} resident, {mib(paused)} paused, identical after resume: {same}")
    return {"resident": before, "paused": paused, "exact": same}


def control_contention(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """The same, with the memory taken: whatever happens is the result. Should this process end in resume, that is it."""
    saver, model, _ = saver_model()
    torch.cuda.empty_cache()
    saver.pause()
    other = occupant(device, 16 * MIB)
    print("RESUMING", flush=True)
    write(options.out, {"survived": False, "model": model.name}, device)
    try:
        saver.resume()
    except Exception as error:
        say(f"torch-memory-saver: {type(error).__name__}: {error}")
    other.communicate("")
    return {"survived": True, "model": model.name}


def write(out: Path, result: dict[str, Any], device: Device) -> None:
    out.write_text(json.dumps(result | {"device": torch.cuda.get_device_name(0), "software": device.software}))


SCENES = {
    "baseline": baseline, "turns": turns, "contention": contention, "control": control, "control-contention": control_contention,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("scene", choices=SCENES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sabotage")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.cuda.init()
    device = Device()
    try:
        result = SCENES[options.scene](device, options)
    except Unmet as unmet:
        print(f"    NOT SHOWN: {unmet}", flush=True)
        return 1
    write(options.out, result, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
