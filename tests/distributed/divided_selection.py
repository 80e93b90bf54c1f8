"""The selection of an indexer on one of several ranks, over random fp8_ds_mla keys."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.distributed import Group
from fd_dsa.step import StepMetadataBuilder
from tests.kernel_memory import KernelMemory
from tests.strategies import make_batch

BLOCK, DIM, PADDING = 64, 128, 2


class Sizes(NamedTuple):
    """An indexer, and (encoder, decoder, this_time) of the rows of a step."""

    topk: int
    heads: int
    rows: list[tuple[int, int, int]]


# prompts below, across and past the selection, prefix hits, idle and decode rows between them
SMALL = Sizes(64, 16, [(20, 0, 20), (0, 90, 1), (40, 50, 40), (0, 0, 0), (36, 66, 36), (0, 70, 3)])
LARGE = Sizes(
    2048, 64, [(1500, 0, 1500), (0, 9000, 1), (3001, 1100, 3001), (2500, 30_000, 2500), (0, 70, 3)]
)


def select(memory: KernelMemory, sizes: Sizes, group: Group | None) -> np.ndarray:
    """Return the slots of each token of the step, without its padding."""
    from fd_dsa.attention.device import DeviceAttention

    num_tokens = sum(new for _, _, new in sizes.rows)
    padded = num_tokens + PADDING
    batch = make_batch(sizes.rows, BLOCK, num_padded_tokens=padded)
    limits = len(sizes.rows), padded, batch.block_tables.shape[1]
    layout = CacheLayout("fp8_ds_mla", BLOCK, 512, 64, DIM)
    config = DSABackendConfig(16, sizes.heads, sizes.topk, 0.1, layout, *limits, dtype="bfloat16")
    built = StepMetadataBuilder(*limits, BLOCK, device="numpy").build(*batch.inputs(), padded)
    values = {field.name: getattr(built, field.name) for field in fields(built)}
    step: Any = SimpleNamespace(
        **{k: memory.put(np.array(v)) if hasattr(v, "shape") else v for k, v in values.items()}
    )
    rng = np.random.default_rng(0)
    # codes without NaN, of magnitudes from 2^-6 to 2
    codes = rng.integers(0, 256, (batch.num_blocks, BLOCK * DIM), np.uint8) & 0xBF
    scales = rng.uniform(0.5, 2, (batch.num_blocks, BLOCK)).astype(np.float32)
    keys = np.concatenate([codes, scales.view(np.uint8)], axis=1).reshape(-1, BLOCK, DIM + 4)
    q = rng.integers(0, 256, (padded, sizes.heads, DIM), np.uint8) & 0xBF
    weights = rng.standard_normal((padded, sizes.heads)).astype(np.float32)
    attention = DeviceAttention(config, memory.poisoned, group)
    attention.begin_step(step, batch.inputs()[:3])
    inputs = (memory.put(array) for array in (q, weights, keys))
    return memory.get(attention.select(step, *inputs))[:num_tokens]
