"""Host memory for evicted prefix blocks, taken at the start of an engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fd_dsa.distributed.host import HostGroup
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.host_tier import HostTier
from fd_dsa.errors import DeviceError
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.startup.plan import EnginePlan
from fd_dsa.tensor import StepArray

if TYPE_CHECKING:
    from fd_dsa.runner.model_runner import ModelRunner
    from fd_dsa.runner.protocol import BlockStore

logger = logging.getLogger(__name__)

# bytes of a reason that ranks exchange
_REASON_BYTES = 256


def make_block_stores(
    runner: ModelRunner, plan: EnginePlan, group: HostGroup | None
) -> tuple[BlockStore | None, BlockStore | None]:
    """Take this rank's host memory for prefix blocks and snapshots, page-locked for a device.

    Args:
        group: ranks that share the model, each of which makes this call now; None = one rank.

    Returns:
        Memory of blocks, and of snapshots for a model that has them. None without such memory in
        the plan, or if a rank cannot have it. The log has the reason.
    """
    memory, caches = plan.memory, plan.caches
    if not memory.num_host_blocks:
        return None, None
    blocks, states, reason = None, None, ""
    try:
        in_blocks = caches.by_block(runner.caches, memory.num_blocks)
        blocks = _take(in_blocks, memory.num_host_blocks, runner, plan)
        if memory.num_host_snapshots:
            slots = caches.slots(runner.attn_backends[0])
            states = _take(slots, memory.num_host_snapshots, runner, plan)
    except DeviceError as error:
        reason = str(error)
    if group is not None:
        reason = _first_reason(reason, group)
    if not reason:
        return blocks, states
    if group is None or group.rank == 0:
        logger.warning("--kv-offload-bytes: %s; no prefix block is kept in host memory", reason)
    return None, None


def add_host_tier(engine: LLMEngine, store: BlockStore, plan: EnginePlan) -> None:
    """Make an engine keep evicted prefix blocks in host memory."""
    blocks, num_ahead = engine.block_manager, 0
    if store.overlaps:
        # the longest prompt gets all its blocks at once
        num_ahead = min(blocks.num_needed(plan.max_model_len), blocks.num_blocks // 2)
    blocks.use_host_tier(HostTier(store), num_ahead)
    # the name of vLLM
    engine.metrics.cache_config["num_cpu_blocks"] = str(store.num_slots)


def _take(
    caches: Sequence[StepArray], num_slots: int, runner: ModelRunner, plan: EnginePlan
) -> BlockStore:
    """Take the memory of this rank for blocks of caches, or for states in place of blocks.

    Raises:
        DeviceError: the driver cannot lock it, or the ranks cannot gather blocks.
    """
    group = runner.model.group
    # in the runner's order a layer's latents and smaller index keys take turns, so of two ranks one
    # would get all latents
    caches = sorted(caches, key=lambda cache: math.prod(cache.shape))
    own = slice(None) if group is None else slice(group.rank, None, group.size)
    store: BlockStore
    if plan.device == "cpu":
        from fd_dsa.runner.block_store import HostBlockStore

        caches = [as_numpy(cache) for cache in caches]
        store = HostBlockStore(caches[own], num_slots)
    else:
        from fd_dsa.runner.device_block_store import DeviceBlockStore

        if group is not None and not group.gathers_rows:
            raise DeviceError("the ranks cannot gather blocks")
        store = DeviceBlockStore(caches, num_slots, own)
    if group is None:
        return store
    from fd_dsa.runner.rank_blocks import DividedBlockStore

    return DividedBlockStore(store, caches, group)


def _first_reason(reason: str, group: HostGroup) -> str:
    """Return the reason of the first rank that has one, "" without any."""
    text = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES)
    for rank, row in enumerate(group.all_gather(np.frombuffer(text, np.uint8))):
        given = row.tobytes().decode(errors="replace").strip()
        if given:
            return f"rank {rank}: {given}"
    return ""
