"""Loading of a model's weights, on the host or on a device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.distributed import Group
from fd_dsa.distributed.host import HostGroup
from fd_dsa.startup.memory import format_bytes
from fd_dsa.startup.plan import EnginePlan
from fd_dsa.startup.progress import LoadProgress, StartupProgress

if TYPE_CHECKING:
    from fd_dsa.device.allocation import Allocate


def load_model(plan: EnginePlan, group: HostGroup | None, progress: StartupProgress) -> Any:
    """Load the model of a plan with its weights, on its device.

    Args:
        group: ranks that share the model; None = one rank.
        progress: gets the bytes loaded so far.
    """
    from fd_dsa.models.loader import load_dummy_weights, load_weights
    from fd_dsa.models.registry import create_model, open_checkpoint
    from fd_dsa.models.weights import HostWeights

    begin = time.perf_counter()
    weights: Any = HostWeights(group)
    if plan.device != "cpu":
        # only a device needs the kernels and their launcher
        from fd_dsa.device.allocation import paddle_allocator
        from fd_dsa.models.device_weights import DeviceWeights

        allocate, rounds = paddle_allocator(plan.device), plan.model_config.round_scales
        weights = DeviceWeights(
            plan.config.dtype,
            allocate,
            plan.fp8,
            round_scales=rounds,
            group=_on_device(group, allocate),
            four_bits=plan.four_bits,
        )
    model = create_model(plan.model_config, weights)
    with LoadProgress(progress) as bar:

        def loaded(done: int, total: int) -> None:
            bar(done, total)
            if group is not None:
                group.check()

        whole = plan.whole_config
        if plan.config.load_format == "dummy":
            load_dummy_weights(whole, weights.loaders, plan.config.seed, loaded, group)
        else:
            with open_checkpoint(whole, plan.config.model_path) as checkpoint:
                load_weights(checkpoint, whole, weights.loaders, loaded, group)
    weights.finish()
    how = "made up" if plan.config.load_format == "dummy" else "read"
    progress.done(f"{format_bytes(bar.total_bytes)} {how} in {time.perf_counter() - begin:.1f} s")
    return model


def _on_device(group: HostGroup | None, allocate: Allocate) -> Group | None:
    """Return the group of the same ranks for tensors on their devices, None without a group."""
    if group is None:
        return None
    group.has_devices = True
    # only devices need the kernels and libraries
    from fd_dsa.distributed.device import DeviceGroup
    from fd_dsa.distributed.nccl import new_unique_id

    # all ranks use the id of rank 0
    name = group.all_gather(np.frombuffer(new_unique_id(), np.uint8))[0].tobytes()
    return DeviceGroup(group.rank, group.size, name, allocate)
