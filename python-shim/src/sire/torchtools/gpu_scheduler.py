"""How much memory a job needs, found out by running a piece of it in a process of its own, and the whole flow:
probe, reserve, train.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from .._errors import InvalidArgumentError, ProbeError, ProbeTimeoutError, ReservationTimeoutError
from . import _fresh, _measure
from .device import gpu_index, uuid
from .gpu_lock import DEFAULT_MARGIN, FileLock, _cuda, reserve_gpu_for_training, take_lock

_T = TypeVar("_T")

# A probe waits for its turn as long as so many others like it may take.
_PROBES_BEFORE = 10

_GUARDED = (
    "a probe that is made of what the program's own file defines needs a file that can be imported; "
    "call it under if __name__ == '__main__':"
)


@dataclass(frozen=True)
class ProbeReport:
    """What a probe needed, in bytes of physical GPU memory. All zeros without CUDA."""

    peak_bytes: int = 0
    """The most that its process had beyond the bare CUDA context: tensors, caches, libraries' workspaces and code."""
    context_bytes: int = 0
    """What the bare context takes in every process."""
    torch_peak_bytes: int = 0
    """The most that PyTorch's allocator had from the driver."""
    torch_peak_allocated_bytes: int = 0
    """The most that tensors took."""
    tags: dict[str, int] = field(default_factory=dict)
    """For each of Sire's tags, the most that was on the GPU."""
    seconds: float = 0.0
    """How long it ran."""
    device: str = "cpu"
    """The name of the GPU."""


@dataclass(frozen=True)
class ProbeFunction:
    """What `make_probe_fn` returns: builds a model and a batch, and runs them. Can be sent to another process."""

    model_ctor: Callable[[], Any] | str | None = None
    input_shape: tuple[int, ...] | None = None
    sample_batch: Any = None
    device: Any = None
    forward_and_backward: bool = False
    warmup_steps: int = 1

    def __call__(self) -> None:
        """Runs on its device; whatever goes wrong is raised."""
        import torch

        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = self._model()
        if model is not None and not _is_on(model, device):
            model = model.to(device)
        batch = _moved(self.sample_batch, device)
        if batch is None and self.input_shape is not None:
            batch = torch.randn(self.input_shape, device=device)
        for _ in range(max(1, self.warmup_steps)):
            self._step(torch, model, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _model(self) -> Any:
        if not isinstance(self.model_ctor, str):
            return None if self.model_ctor is None else self.model_ctor()
        module, _, attribute = self.model_ctor.partition(":")
        if not attribute:
            raise InvalidArgumentError(f"{self.model_ctor!r} names no model; write 'module:attribute'")
        return getattr(importlib.import_module(module), attribute)()

    def _step(self, torch: Any, model: Any, batch: Any) -> None:
        if model is None:
            return
        with torch.set_grad_enabled(self.forward_and_backward):
            output = _called(model, batch)
        if self.forward_and_backward:
            _loss(torch, output).backward()


def make_probe_fn(
    model_ctor: Callable[[], Any] | str | None = None,
    input_shape: Sequence[int] | None = None,
    sample_batch: Any = None,
    device: Any = None,
    forward_and_backward: bool = False,
    warmup_steps: int = 1,
) -> ProbeFunction:
    """A probe that builds ``model_ctor()`` (or ``"module:attribute"``), and calls it ``warmup_steps`` times with
    ``sample_batch`` (a tensor, or a sequence or mapping of tensors) or random numbers of ``input_shape``; with
    ``forward_and_backward`` gradients are computed too. Without a model it only makes the batch. Constructors must
    be importable in another process: no lambdas.
    """
    shape = None if input_shape is None else tuple(int(each) for each in input_shape)
    return ProbeFunction(model_ctor, shape, sample_batch, device, forward_and_backward, int(warmup_steps))


def _is_on(model: Any, device: Any) -> bool:
    """Whether nothing has to be moved: fake parameters, which cannot be, never have to."""
    if not hasattr(model, "parameters"):
        return not hasattr(model, "to")
    return all(each.device.type == device.type == "cpu" for each in (*model.parameters(), *model.buffers()))


def _moved(batch: Any, device: Any) -> Any:
    """Everything in a batch that can be moved, in whatever table or sequence; of a table, a dict."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(each, device) for name, each in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [_moved(each, device) for each in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _called(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(*batch)
    return model() if batch is None else model(batch)


def _loss(torch: Any, output: Any) -> Any:
    """A number to differentiate: the output's own loss, or the sum of its tensors."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return sum(_loss(torch, each) for each in output if hasattr(each, "sum") or isinstance(each, (list, tuple)))
    return output.float().sum()


# --- probing ---------------------------------------------------------------------------------------------


def probe(
    probe_fn: Callable[..., object],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    gpu: object = None,
    timeout: float | None = 60.0,
    cache: str | os.PathLike[str] | None = None,
) -> ProbeReport:
    """Runs ``probe_fn(*args, **kwargs)`` in a fresh process with one GPU current, and reports what it needed there.

    One probe at a time runs on a GPU, whoever starts it; ``timeout`` counts from its turn on, for which it waits ten
    times as long. `ProbeError` with the traceback of whatever it raised, or with the signal that ended it;
    `ProbeTimeoutError` if it, or its turn, took too long.
    ``cache`` is a directory in which reports are kept, by probe (model and shapes), arguments, GPU and version of
    PyTorch. Without CUDA nothing runs, and the report is empty.
    """
    torch = _cuda()
    if torch is None:
        return ProbeReport()
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # The fresh process runs the program's file again, and would wait for its own parent.
        raise ProbeError(f"this process runs the program's file again for a probe: {_GUARDED}")
    index = gpu_index(torch, gpu)
    file = None if cache is None else Path(cache) / f"{_key(torch, index, probe_fn, args, kwargs)}.json"
    known = None if file is None else _read(file)
    if known is not None:
        return known
    turn = _turn(f"sire-probe-{uuid(torch, index)}.lock", timeout)
    try:
        report = _run(probe_fn, tuple(args), dict(kwargs or {}), index, timeout)
    finally:
        turn.release()
    if file is not None:
        _write(file, report)
    return report


def estimate_gpu_usage_by_probe(
    probe_fn: Callable[..., object],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    gpu: object = None,
    timeout: float | None = 60.0,
    cache: str | os.PathLike[str] | None = None,
) -> int:
    """The ``peak_bytes`` of `probe`: what a reservation for such a job should have."""
    return probe(probe_fn, args, kwargs, gpu, timeout, cache).peak_bytes


def estimate_without_running(probe_fn: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """The most bytes of tensors that ``probe_fn`` has at once, found with fake tensors: nothing is computed, and no
    GPU is needed. Libraries' memory and what caches waste are not in it, so that it is a lower bound of what `probe`
    finds.
    """
    return _measure.fake_peak(probe_fn, args, kwargs)


def _turn(name: str, timeout: float | None) -> FileLock:
    """Any user may hold the lock, and for any time: nobody waits for it without end who has not said so."""
    seconds = math.inf if timeout is None else timeout * _PROBES_BEFORE
    try:
        return take_lock(name, seconds)
    except ReservationTimeoutError as error:
        raise ProbeTimeoutError(
            f"the probe did not have its turn within {seconds:g} s, {_PROBES_BEFORE} times its time-out: {error}; "
            "give it more time, or see who keeps that file locked (lslocks)"
        ) from error


def _run(
    probe_fn: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any], index: int, timeout: float | None
) -> ProbeReport:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, probe_fn, args, kwargs, index), name="sire-probe")
    try:
        again = _fresh.start(child, (probe_fn, args, kwargs))
    except Exception as error:
        ours.close()
        raise ProbeError(
            f"the probe cannot be sent to another process: {error}. Use a function of a module."
        ) from error
    finally:
        theirs.close()
    try:
        return _answer(child, ours, timeout, again)
    finally:
        if child.is_alive():
            child.kill()
        child.join()
        ours.close()


def _answer(child: Any, pipe: Connection, timeout: float | None, again: bool) -> ProbeReport:
    if not pipe.poll(timeout):
        raise ProbeTimeoutError(f"the probe was not done after {timeout:g} s, and was ended; give it more time")
    try:
        outcome, value = pipe.recv()
    except EOFError:
        child.join()
        code = child.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        why = f" (standard error says why); {_GUARDED}" if again and code > 0 else ""
        raise ProbeError(f"the probe's process {how} before it was done{why}") from None
    if outcome == "failed":
        raise ProbeError(f"the probe failed:\n{value}")
    return ProbeReport(**value)


def _child(
    pipe: Connection, probe_fn: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any], index: int
) -> None:
    """The probe's process."""
    import traceback

    try:
        figures = _measure.run(probe_fn, args, kwargs, index)
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    else:
        pipe.send(("done", figures))
    pipe.close()


# --- what is known already -------------------------------------------------------------------------------


def _key(
    torch: Any, index: int, probe_fn: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> str:
    described = [
        _described(probe_fn),
        [_described(each) for each in args],
        sorted((name, _described(each)) for name, each in (kwargs or {}).items()),
        torch.cuda.get_device_name(index),
        str(torch.__version__),
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _described(value: Any) -> str:
    """The same for the same model and shapes, in every process."""
    if isinstance(value, ProbeFunction):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        return f"probe({', '.join(f'{name}={_described(each)}' for name, each in fields.items())})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"tensor({tuple(value.shape)}, {value.dtype})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_described(each)}' for name, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_described(each) for each in value)}]"
    return _function(value) if callable(value) else _plain(value)


def _function(value: Any) -> str:
    if hasattr(value, "named_parameters") and hasattr(value, "named_buffers"):
        # What a module shows of itself says neither its weights' shapes nor their types.
        weights = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        return f"{_class(value)} {_plain(value)} {_described(weights)}"
    if isinstance(value, functools.partial):
        return f"partial({_described(value.func)}, {_described(value.args)}, {_described(value.keywords)})"
    if not hasattr(value, "__qualname__"):
        return _plain(value)
    owner = getattr(value, "__self__", None)
    bound = "" if owner is None or inspect.ismodule(owner) else f" of {_described(owner)}"
    return f"{value.__module__}:{value.__qualname__}{bound}"


def _class(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _plain(value: Any) -> str:
    """What a value shows of itself; where that is where it lies, which the next process does not share, what it has."""
    shown = repr(value)
    if re.search(r" at 0x[0-9a-fA-F]+", shown) is None:
        return shown
    fields = {name: each for name, each in getattr(value, "__dict__", {}).items() if each is not value}
    try:
        return f"{_class(value)}({_described(fields)})"
    except RecursionError:
        return _class(value)


def _read(file: Path) -> ProbeReport | None:
    try:
        return ProbeReport(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, report: ProbeReport) -> None:
    """Whole or not at all; a report that cannot be kept is found anew."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(report)))
        draft.replace(file)
    except OSError:
        draft.unlink(missing_ok=True)


# --- probe, reserve, train -------------------------------------------------------------------------------


def run_training_with_reservation(
    train_fn: Callable[..., _T],
    train_args: Sequence[Any] = (),
    train_kwargs: Mapping[str, Any] | None = None,
    *,
    probe_fn: Callable[..., object] | None = None,
    probe_args: Sequence[Any] = (),
    probe_kwargs: Mapping[str, Any] | None = None,
    gpu: object = None,
    countdown: float = 0,
    reserve_kwargs: Mapping[str, Any] | None = None,
    probe_timeout: float | None = 60.0,
) -> _T:
    """Finds out how much ``probe_fn`` needs, reserves that, waits ``countdown`` seconds, and returns
    ``train_fn(*train_args, **train_kwargs)``; the reservation holds until that returns or raises. ``reserve_kwargs``
    go to `reserve_gpu_for_training`. Without a probe, ``training_reserved_bytes`` in there says how much, else the
    GPU is reserved for this process alone. Without CUDA it just trains.
    """
    wishes = {"gpu": gpu, **(reserve_kwargs or {})}
    if probe_fn is not None and "training_reserved_bytes" not in wishes:
        estimate = estimate_gpu_usage_by_probe(probe_fn, probe_args, probe_kwargs, wishes["gpu"], probe_timeout)
        # A probe that needed nothing measurable is no reason to take the whole GPU.
        wishes["training_reserved_bytes"] = max(1, estimate)
    wishes.setdefault("safety_margin_bytes", DEFAULT_MARGIN)
    with reserve_gpu_for_training(**wishes):
        if countdown > 0:
            time.sleep(countdown)
        return train_fn(*train_args, **(train_kwargs or {}))
