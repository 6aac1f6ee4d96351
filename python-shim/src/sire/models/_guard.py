"""What an object was apart from the content of its tensors: put back when a change to it fails half way."""

from __future__ import annotations

from typing import Any


class Guard:
    """Remembers an object's attributes; of a module those of all of its submodules, with their tables of tensors and
    hooks.
    """

    def __init__(self, obj: Any) -> None:
        self._states = [(each, _snapshot(each)) for each in _parts(obj)]
        self._tensors = [(name, each, each._version) for name, each in _tensors(obj)]

    def restore(self, error: BaseException, restored: list[Any]) -> None:
        """Puts attributes back. Tensors that were written to and are not among those ``restored`` are named on the
        error.
        """
        for part, state in self._states:
            _put_back(part, state)
        known = {id(each) for each in restored}
        written = [name for name, each, version in self._tensors if each._version != version and id(each) not in known]
        if written:
            unknown = (
                f"a commit failed after it had written to {', '.join(written[:5])}, which it does not list in touches="
            )
            error.sire_state_unknown = unknown  # type: ignore[attr-defined]


def _parts(obj: Any) -> list[Any]:
    modules = getattr(obj, "modules", None)
    parts = list(modules()) if callable(modules) and hasattr(obj, "_modules") else [obj]
    return [each for each in parts if hasattr(each, "__dict__")]


def _tensors(obj: Any) -> list[tuple[str, Any]]:
    if not hasattr(obj, "named_parameters"):
        return []
    named = [*obj.named_parameters(), *obj.named_buffers()]
    return [(name, each) for name, each in named if not each.is_inference()]


def _snapshot(part: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (value, _copy(value)) for name, value in vars(part).items()}


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else None


def _put_back(part: Any, state: dict[str, tuple[Any, Any]]) -> None:
    attributes = vars(part)
    for name in attributes.keys() - state.keys():
        del attributes[name]
    for name, (value, copy) in state.items():
        attributes[name] = value
        if isinstance(value, dict | set):
            value.clear()
            value.update(copy)
        elif isinstance(value, list):
            value[:] = copy
