"""Worker: bytes of the caches as allocated, and of what a step takes beside them."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np

_BLOCK_SIZE = 64
_WIDTHS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
_MIB = 1 << 20


def _layout() -> Any:
    """The FP8 caches of DeepSeek-V3.2."""
    from fd_dsa.attention import CacheLayout

    return CacheLayout("fp8_ds_mla", _BLOCK_SIZE, *_WIDTHS.values())


def cache_bytes(layers: int, indexer_layers: int, num_blocks: int) -> dict[str, Any]:
    """Bytes a token and layer: by the plan's formula, and of arrays as the runner allocates them.

    Args:
        layers: of the model.
        indexer_layers: those of them with an indexer; the others have no index keys.
        num_blocks: of the caches.
    """
    layout = _layout()
    latents = [layout.allocate(layout.latent_shape(num_blocks)) for _ in range(layers)]
    index = [layout.allocate(layout.indexer_shape(num_blocks)) for _ in range(indexer_layers)]
    cells = layers * num_blocks * _BLOCK_SIZE
    allocated = sum(cache.numpy().nbytes for cache in (*latents, *index))
    planned = num_blocks * layout.bytes_per_block(layers, indexer_layers)
    return {"planned": planned / cells, "allocated": allocated / cells}


def engine_bytes() -> dict[str, Any]:
    """The plan of an engine of the demo model, and the arrays of its runner."""
    from fd_dsa.config import EngineConfig
    from fd_dsa.startup.build import build_engine

    config = EngineConfig(
        kv_cache_dtype="fp8_ds_mla", num_gpu_blocks_override=300, speculative_config="none"
    )
    engine = build_engine(config)
    caches = [cache.numpy().nbytes for cache in engine.runner.caches]
    layers = engine.runner.model.config.num_hidden_layers
    return {"layers": layers, "bytes_a_token_and_layer": sum(caches) / (300 * _BLOCK_SIZE * layers)}


def device_buffers(max_model_len: int, max_num_tokens: int) -> dict[str, Any]:
    """MiB that a device's attention asks for scores, with the sizes of DeepSeek-V3.2.

    They are asked for once, when the engine starts, and no step asks for more; the tests hold that
    no step does. Nothing is written here, so the system gives no memory.
    """
    import paddle

    from fd_dsa.attention.config import DSABackendConfig
    from fd_dsa.attention.device import DeviceAttention
    from tests.kernel_memory import open_memory

    open_memory("interpreter")
    config = DSABackendConfig(
        num_heads=128,
        index_n_heads=64,
        index_topk=2048,
        softmax_scale=1.0,
        cache_layout=_layout(),
        max_num_seqs=64,
        max_num_tokens=max_num_tokens,
        max_blocks_per_seq=-(-max_model_len // _BLOCK_SIZE),
        dtype="bfloat16",
    )
    attention = DeviceAttention(config, lambda shape, dtype: paddle.empty(list(shape), dtype))
    logits, _ = attention._buffers["logits"]
    return {"scores_mib": logits.size * logits.element_size() / _MIB}


def prefill_peak(context: int, tokens: int) -> dict[str, Any]:
    """Most memory that the last chunk of a prompt takes on a CPU beside caches and weights.

    One layer with V3.2's widths and 64 index heads, after caches that hold zeros. NumPy's arrays
    are counted by tracemalloc, Paddle's by its own statistic of host memory; each is the peak over
    what there was before the chunk, so their sum is an upper bound. One chunk ran before, so what
    is kept for later steps counts only where it grows: `kept` of a first run counts it too.
    """
    from paddle.base import core

    from fd_dsa.runner import InputBatch, ModelRunner
    from tests.runner.tiny import V32, tiny_model

    fields = {"num_hidden_layers": 1, "index_n_heads": 64, "index_topk": 2048} | _WIDTHS
    fields["max_position_embeddings"] = context
    model = tiny_model(V32 | fields)
    columns = -(-context // _BLOCK_SIZE)
    batch = InputBatch(1, tokens, columns, _BLOCK_SIZE)
    layout = model.config.cache_layout("fp8_ds_mla", _BLOCK_SIZE)
    runner = ModelRunner(model, batch, layout, columns)
    batch.set_blocks(0, range(columns))
    batch.begin_step()
    last = batch.add_row(0, [5] * tokens, context - tokens, True)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = core.host_memory_stat_current_value("Allocated", 0)
    tracemalloc.start()
    try:
        runner.execute_model(np.array([last]))
        numpy_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    paddle_bytes = core.host_memory_stat_peak_value("Allocated", 0) - before
    return {"numpy_mib": numpy_bytes / _MIB, "paddle_mib": paddle_bytes / _MIB}
