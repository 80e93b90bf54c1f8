"""A step over random fp8_ds_mla index keys, whose scores are exact in every order of sums."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np

from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.step import StepMetadataBuilder
from tests.kernel_memory import KernelMemory
from tests.strategies import make_batch

PADDING = 2
DIM, BLOCK = 128, 64
# e4m3 codes of 0, 1, 2, -1 and -2: dot products are exact in any order
_SMALL = np.array([0x00, 0x38, 0x40, 0xB8, 0xC0], np.uint8)


class ScoreCase:
    """A step with 32 index heads that keeps 64 keys a token, and a layer's queries and keys.

    Args:
        rows: (encoder, decoder, this_time) of each request.

    Attributes:
        config: sizes of the step and its layers.
        step: its metadata.
        index_q, weights: of the step's tokens.
        keys: the indexer cache.
    """

    def __init__(self, memory: KernelMemory, rows: list[Any]) -> None:
        num_tokens = sum(new for _, _, new in rows) + PADDING
        batch = make_batch(rows, BLOCK, num_padded_tokens=num_tokens)
        self.config = DSABackendConfig(
            num_heads=64,
            index_n_heads=32,
            index_topk=64,
            softmax_scale=0.1,
            cache_layout=CacheLayout("fp8_ds_mla", BLOCK, 512, 64, DIM),
            max_num_seqs=len(rows),
            max_num_tokens=num_tokens,
            max_blocks_per_seq=batch.block_tables.shape[1],
            dtype="bfloat16",
        )
        self.step = self._step(memory, batch)
        rng = np.random.default_rng(0)
        num_blocks, heads = batch.num_blocks, self.config.index_n_heads
        scales = np.exp2(rng.integers(-2, 2, (num_blocks, BLOCK))).astype(np.float32)
        codes = rng.choice(_SMALL, (num_blocks, BLOCK * DIM))
        keys = np.concatenate([codes, scales.view(np.uint8)], axis=1)
        weights = rng.integers(-2, 3, (num_tokens, heads)).astype(np.float32) / 2
        self.index_q = memory.put(rng.choice(_SMALL, (num_tokens, heads, DIM)))
        self.weights = memory.put(weights)
        self.keys = memory.put(keys.reshape(num_blocks, BLOCK, DIM + 4))

    def _step(self, memory: KernelMemory, batch: Any) -> Any:
        """The metadata, as tensors."""
        limits = (self.config.max_num_seqs, self.config.max_num_tokens)
        columns = batch.block_tables.shape[1]
        builder = StepMetadataBuilder(*limits, columns, BLOCK, device="numpy")
        meta = builder.build(*batch.inputs(), batch.num_padded_tokens)
        values = {field.name: getattr(meta, field.name) for field in fields(meta)}
        return SimpleNamespace(
            **{k: memory.put(np.array(v)) if hasattr(v, "shape") else v for k, v in values.items()}
        )
