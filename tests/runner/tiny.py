"""Tiny models with random weights in memory, and runners for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.dequantize import TensorInfo
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import config_from_dict, create_model
from fd_dsa.models.sources import StoredTensor
from fd_dsa.models.weights import HostWeights
from fd_dsa.runner import InputBatch, ModelRunner
from tests.models.drawn import in_drawn_order
from tests.models.folders import TINY, TINY_GLM, Stored, f32
from tests.runner.dsa import dsa_runner

BLOCK_SIZE, BLOCKS_PER_ROW, MAX_ROWS, MAX_TOKENS = 16, 4, 5, 160

# 16 heads: with few, exact zeros tie and rounding elsewhere decides
V32 = TINY | {"index_n_heads": 16, "index_topk": 12, "kv_lora_rank": 16}
GLM = TINY_GLM | {"index_n_heads": 16, "index_topk": 12, "attention_bias": False}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Checkpoint tensors whose scale keeps activations near 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, expected in in_drawn_order(expected_tensors(config)).items():
        draw = rng.standard_normal(expected.shape).astype(np.float32)
        if "norm" in name and not name.endswith("bias"):
            tensors[name] = 1 + np.float32(0.2) * draw
        elif len(expected.shape) == 1:
            tensors[name] = np.float32(0.1) * draw
        else:
            tensors[name] = draw / np.float32(math.sqrt(expected.shape[1]))
    return tensors


def stored_as(name: str, tensor: Stored, scale: StoredTensor | None = None) -> StoredTensor:
    """A tensor of a test's file, as its checkpoint would give it."""
    raw = np.frombuffer(tensor.data, np.uint8)
    info = TensorInfo(name, tensor.dtype, tensor.shape, Path("made"), 0, raw.nbytes)
    return StoredTensor(info, raw, scale, (128, 128))


def stored(name: str, array: np.ndarray) -> StoredTensor:
    """A float32 array as a tensor of a checkpoint."""
    return stored_as(name, f32(array))


def tiny_model(
    fields: dict[str, Any],
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    mtp: tuple[str, ...] | None = None,
) -> Any:
    """A model of these config.json fields with random weights."""
    config = config_from_dict(fields)
    if mtp is not None:
        config = config.with_mtp_layer(*mtp)
    weights: Any = HostWeights()
    if device != "cpu":
        from fd_dsa.device.allocation import paddle_allocator
        from fd_dsa.models.device_weights import DeviceWeights

        weights = DeviceWeights(dtype, paddle_allocator(device))
    model = create_model(config, weights)
    for name, array in random_tensors(config, seed).items():
        if name in weights.loaders:
            weights.loaders[name](stored(name, array))
    weights.finish()
    return model


def tiny_runner(model: Any, kv_cache_dtype: str = "float32", poison: bool = False) -> ModelRunner:
    """A runner whose rows own shuffled blocks, block 0 the first of row 0.

    `poison` fills the caches with NaN.
    """
    batch = InputBatch(MAX_ROWS, MAX_TOKENS, BLOCKS_PER_ROW, BLOCK_SIZE)
    num_blocks = MAX_ROWS * BLOCKS_PER_ROW + 1
    layout = model.config.cache_layout(kv_cache_dtype, BLOCK_SIZE)
    runner = dsa_runner(model, batch, layout, num_blocks)
    blocks = [0, *(np.random.default_rng(0).permutation(num_blocks - 1) + 1)]
    for row in range(MAX_ROWS):
        batch.set_blocks(row, blocks[row::MAX_ROWS][:BLOCKS_PER_ROW])
    if poison:
        for cache in runner.caches:
            if cache is not None:
                np.from_dlpack(cache)[...] = np.nan if kv_cache_dtype == "float32" else 0x7FC1
    return runner


def run_rows(runner: ModelRunner, rows: list[tuple[int, list[int], int, bool]]) -> np.ndarray:
    """Logits of every token of a step of `(row, token ids, tokens in the cache, is prefill)`."""
    runner.input_batch.begin_step()
    for row in rows:
        runner.input_batch.add_row(*row)
    return runner.execute_model(np.arange(runner.input_batch.num_tokens))
