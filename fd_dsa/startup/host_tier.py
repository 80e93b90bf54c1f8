"""Host memory for evicted prefix blocks, added to an engine at its start."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.host_tier import HostTier
from fd_dsa.errors import DeviceError
from fd_dsa.startup.plan import EnginePlan

if TYPE_CHECKING:
    from fd_dsa.runner.model_runner import ModelRunner
    from fd_dsa.runner.protocol import BlockStore

logger = logging.getLogger(__name__)


def add_host_tier(engine: LLMEngine, runner: ModelRunner, plan: EnginePlan) -> None:
    """Make an engine keep evicted prefix blocks in host memory, if the plan has some."""
    if not plan.memory.num_host_blocks:
        return
    try:
        store = _make_store(runner, plan)
    except DeviceError as error:
        logger.warning("--kv-offload-bytes: %s; no prefix block is kept in host memory", error)
        return
    blocks, num_ahead = engine.block_manager, 0
    if store.overlaps:
        # the longest prompt gets all its blocks at once
        num_ahead = min(blocks.num_needed(plan.max_model_len), blocks.num_blocks // 2)
    blocks.use_host_tier(HostTier(store), num_ahead)
    # the name of vLLM
    engine.metrics.cache_config["num_cpu_blocks"] = str(store.num_slots)


def _make_store(runner: ModelRunner, plan: EnginePlan) -> BlockStore:
    """Take the host memory, page-locked for a device."""
    num_slots = plan.memory.num_host_blocks
    if plan.device == "cpu":
        from fd_dsa.runner.block_store import HostBlockStore

        return HostBlockStore(runner.caches, num_slots)
    from fd_dsa.runner.device_block_store import DeviceBlockStore

    return DeviceBlockStore(runner.caches, num_slots)
