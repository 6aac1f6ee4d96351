"""More models than the device holds: they come when they are used, and make way when others need the memory.

    import sire

    sire.setup_default_pools()
    with sire.auto_manage(model) as wrapper:
        model(x.to(wrapper.get_execution_device()))

What is here is also in `sire` itself, and imported at the first use. `adopt` is the step below: it moves one module
when it is told to, and knows no policy.
"""

from .._adopt import Adopted, adopt, adopted_by
from ._context import (
    InferenceContext,
    get_sire_inference_context,
    sire_inference_context,
    sire_inference_context_manager,
)
from ._estimate import LearnedEstimator, Profiler, learned_estimator
from ._events import Event, events
from ._hooks import AutoManageHook
from ._libraries import DiffusersPipelineWrapper, TransformersModelWrapper
from ._manage import AutoManageWrapper, auto_manage, evict, manage
from ._pools import (
    ResourcePool,
    ResourcePoolCPU,
    ResourcePoolCUDA,
    ResourcePoolDisk,
    ResourcePoolManagement,
    get_resource_management,
)
from ._public import Prefetch, pin, prefetch, summary, unpin
from ._setup import initialize, setup_default_pools
from ._users import BaseResourcePoolUser, ResourcePoolUserABC, TorchModuleWrapper, WeakRefResourcePoolUser

__all__ = [
    "Adopted",
    "AutoManageHook",
    "AutoManageWrapper",
    "BaseResourcePoolUser",
    "DiffusersPipelineWrapper",
    "Event",
    "InferenceContext",
    "LearnedEstimator",
    "Prefetch",
    "Profiler",
    "ResourcePool",
    "ResourcePoolCPU",
    "ResourcePoolCUDA",
    "ResourcePoolDisk",
    "ResourcePoolManagement",
    "ResourcePoolUserABC",
    "TorchModuleWrapper",
    "TransformersModelWrapper",
    "WeakRefResourcePoolUser",
    "adopt",
    "adopted_by",
    "auto_manage",
    "events",
    "evict",
    "get_resource_management",
    "get_sire_inference_context",
    "initialize",
    "learned_estimator",
    "manage",
    "pin",
    "prefetch",
    "setup_default_pools",
    "sire_inference_context",
    "sire_inference_context_manager",
    "summary",
    "unpin",
]
