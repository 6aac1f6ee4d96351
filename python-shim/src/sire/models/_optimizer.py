"""Models larger than the device, by a plan that the first forward makes: which layer comes when.

The layers become units of `sire.memory`; the first forward shows in which order they are used and how large they are.
That is the plan: at each layer, the one that is needed next is brought in the background. It is kept as JSON, by a
signature of the module, so that the next process need not profile.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .._errors import InvalidArgumentError
from ..memory import MemoryConfig, MemoryManager
from ._commits import CommitABC, Revert

# Up to here layers are brought early: close to where others have to make way (`gpu_offload_threshold`).
_EARLY = 0.84


@dataclass(frozen=True)
class PrefetchInstruction:
    """While ``trigger_module`` runs, ``module_to_prefetch`` is brought to ``target_device``."""

    module_to_prefetch: str
    target_device: str
    trigger_module: str


@dataclass(frozen=True)
class OptimizationPlan:
    """What a profile says: where each module is between uses, who brings whom, and bytes by module."""

    optimized_device_map: dict[str, str]
    prefetch_schedule: tuple[PrefetchInstruction, ...]
    module_footprints: dict[str, int]

    @property
    def order(self) -> list[str]:
        """Modules in the order of their first use."""
        return list(self.module_footprints)

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> OptimizationPlan:
        """From what `to_json` wrote; `InvalidArgumentError` if it is something else."""
        try:
            fields = json.loads(text)
            schedule = tuple(PrefetchInstruction(**each) for each in fields["prefetch_schedule"])
            footprints = {str(name): int(size) for name, size in fields["module_footprints"].items()}
            places = {str(name): str(place) for name, place in fields["optimized_device_map"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidArgumentError(f"this is not the JSON of an OptimizationPlan: {error}") from error
        return cls(places, schedule, footprints)


class InferenceOptimizerHook:
    """Makes a module's layers come when they are used, in the order that a profile found.

    ``cache_dir``: where plans are kept (None: nowhere). ``num_prefetch_streams``: how many layers are brought in
    advance. ``no_split_module_classes``: classes, or their names, whose modules come as a whole; otherwise every
    module with parameters of its own is one. ``custom_signature_callback(module)``: text that tells plans apart.
    ``default_offload_policy``: ``"cpu"`` or ``"disk"``. ``force_profiling``: a kept plan is not used.
    ``run_profiling_if_needed``: the first forward is a profile; otherwise there is no plan without a kept one.
    ``max_memory_gb``: GiB for layers on the device.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        num_prefetch_streams: int = 1,
        no_split_module_classes: Sequence[type | str] = (),
        custom_signature_callback: Callable[[Any], str] | None = None,
        default_offload_policy: Literal["cpu", "disk"] = "cpu",
        force_profiling: bool = False,
        run_profiling_if_needed: bool = True,
        max_memory_gb: float | None = None,
    ) -> None:
        if default_offload_policy not in ("cpu", "disk"):
            raise InvalidArgumentError(f"default_offload_policy is 'cpu' or 'disk', not {default_offload_policy!r}")
        if not isinstance(num_prefetch_streams, int) or num_prefetch_streams < 0:
            raise InvalidArgumentError(f"num_prefetch_streams is a number, 0 or more, not {num_prefetch_streams!r}")
        self._cache = None if cache_dir is None else Path(cache_dir)
        self._ahead = num_prefetch_streams
        self._whole = {each if isinstance(each, str) else each.__name__ for each in no_split_module_classes}
        self._signature = custom_signature_callback or signature_of
        self._policy = default_offload_policy
        self._force = force_profiling
        self._profile = run_profiling_if_needed
        self._gib = max_memory_gb
        self.plan: OptimizationPlan | None = None
        """The plan, once there is one."""
        self.manager: MemoryManager | None = None
        """What moves the layers while the hook is attached."""
        self._handles: list[Any] = []

    def attach(self, module: Any) -> None:
        """Wraps the layers; the module can be sent to a device of any size afterwards."""
        if self.manager is not None:
            raise InvalidArgumentError(
                "this InferenceOptimizerHook is attached already; detach() it, or make another one"
            )
        config = MemoryConfig(
            vram_cap_gb=self._gib,
            enable_cpu_offload=self._policy == "cpu",
            prefetch_enabled=self._ahead > 0,
            offload_1d_parameters=True,
            gpu_reload_threshold=_EARLY,
        )
        self.manager = MemoryManager(config)
        self.manager.residency.prefetch_depth = self._ahead
        self.manager.residency.by_last_use = True
        try:
            layers = list(_layers(module, self._whole))
            for name, layer in layers:
                self.manager.wrap_module(layer, name)
            self._plan_or_profile(module, layers)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """The module is a plain one again. Repeating it is harmless."""
        self._stop_profiling()
        manager, self.manager = self.manager, None
        if manager is not None:
            manager.cleanup()

    def _plan_or_profile(self, module: Any, layers: list[tuple[str, Any]]) -> None:
        kept = self._kept(module)
        if kept is not None and kept.exists() and not self._force:
            self.plan = OptimizationPlan.from_json(kept.read_text())
            if self.manager is not None and set(self.plan.order) <= {name for name, _ in layers}:
                self.manager.residency.teach(self.plan.order)
            return
        if self._profile:
            self._start_profiling(module, layers, kept)

    def _start_profiling(self, module: Any, layers: list[tuple[str, Any]], kept: Path | None) -> None:
        order: dict[str, int] = {}

        def seen(name: str) -> Callable[[Any, Any], None]:
            def note(layer: Any, _: Any) -> None:
                order.setdefault(name, sum(each.numel() * each.element_size() for each in layer.parameters()))

            return note

        def done(_: Any, __: Any, ___: Any) -> None:
            self._stop_profiling()
            self.plan = _planned(order, self._policy, self._ahead)
            if self.manager is not None:
                self.manager.residency.teach(self.plan.order)
            if kept is not None:
                _write(kept, self.plan.to_json())

        self._handles = [layer.register_forward_pre_hook(seen(name)) for name, layer in layers]
        self._handles.append(module.register_forward_hook(done))

    def _stop_profiling(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _kept(self, module: Any) -> Path | None:
        if self._cache is None:
            return None
        text = f"{self._signature(module)} {sorted(self._whole)} {self._policy} {self._ahead} {self._gib}"
        return self._cache / f"plan-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


class InferenceOptimizerCommit(CommitABC[Any]):
    """`InferenceOptimizerHook` as a commit: applying attaches one, reverting detaches it. Takes the hook's
    arguments.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self._make: Callable[[], InferenceOptimizerHook] = lambda: InferenceOptimizerHook(cache_dir, **options)
        self._make()  # arguments are judged now

    def apply(self, obj: Any, **kwargs: Any) -> Revert:
        """Wraps the module's layers."""
        hook = self._make()
        hook.attach(obj)
        return lambda _: hook.detach()


def signature_of(module: Any) -> str:
    """What tells a module's plan from another's: its class, and the names, shapes and dtypes of its parameters."""
    shapes = [f"{name} {tuple(each.shape)} {each.dtype}" for name, each in module.named_parameters()]
    return "\n".join([type(module).__name__, *shapes])


def _layers(module: Any, whole: set[str], name: str = "") -> Any:
    """Outermost modules of the classes that are not split, and of the rest those with parameters of their own."""
    from .._units.wrapping import original_class
    from ..memory._manager import whole_classes

    own = any(True for _ in module.parameters(recurse=False))
    if name and (own or original_class(module).__name__ in whole or isinstance(module, whole_classes())):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _layers(child, whole, f"{name}.{child_name}" if name else child_name)


def _planned(order: dict[str, int], policy: str, ahead: int) -> OptimizationPlan:
    names = list(order)
    schedule = tuple(
        PrefetchInstruction(names[(at + step) % len(names)], "device", name)
        for at, name in enumerate(names)
        for step in range(1, min(ahead, len(names) - 1) + 1)
    )
    return OptimizationPlan(dict.fromkeys(names, policy), schedule, order)


def _write(path: Path, text: str) -> None:
    """Whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(name, path)
