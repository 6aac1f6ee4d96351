"""Objects of other libraries, known only if the program has imported these."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .._adopt import Release
from ._users import TorchModuleWrapper, WeakRefResourcePoolUser

if TYPE_CHECKING:
    from ._manage import AutoManageWrapper
    from ._pools import ResourcePool, ResourcePoolManagement


class DiffusersPipelineWrapper(WeakRefResourcePoolUser[Any]):
    """A diffusers pipeline: each of its models manages itself, so that one after the other is on the device.

    The pipeline finds its execution device as it does with accelerate's hooks. Keywords are those of
    `TorchModuleWrapper`, for each model.
    """

    def __init__(self, pipeline: Any, **kwargs: Any) -> None:
        import torch

        from ._hooks import AutoManageHook

        super().__init__(pipeline)
        models = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
        self.hooks = [AutoManageHook.manage_module(each, **kwargs) for each in models]
        for model, hook in zip(models, self.hooks, strict=True):
            model._hf_hook = hook
            # What is called beside forward (a VAE's ``decode``) calls `pre_forward` only.
            hook.is_paired = False

    def on_setup(self, _manager: ResourcePoolManagement) -> list[ResourcePool]:
        """None: its models are users themselves."""
        return []

    def on_load(self) -> None:
        """Nothing: each model comes when it is called."""

    def on_offload(self, _release: Release) -> None:
        """Nothing: each model is offloaded after its call."""

    def on_resource_request(self, _device: Any, _size: int) -> None:
        """Nothing: its models are asked themselves."""

    def get_used_resource_size(self, _device: Any) -> int:
        """Nothing of its own."""
        return 0

    def get_runtime_device(self) -> Any:
        """Where its models run."""
        import torch

        return self.hooks[0].execution_device if self.hooks else torch.device("cpu")


class TransformersModelWrapper(TorchModuleWrapper):
    """A transformers model. A whole ``generate`` belongs into one use: ``with sire.auto_manage(model):
    model.generate(...)``.
    """


def register(wrapper: type[AutoManageWrapper]) -> None:
    """Makes known what can be."""
    for library, name, user in (
        ("diffusers", "DiffusionPipeline", DiffusersPipelineWrapper),
        ("transformers", "PreTrainedModel", TransformersModelWrapper),
    ):
        module = sys.modules.get(library)
        kind = getattr(module, name, None) if module is not None else None
        if isinstance(kind, type) and kind not in wrapper.type_wrapper_map:
            wrapper.register_type_wrapper(kind, user)
