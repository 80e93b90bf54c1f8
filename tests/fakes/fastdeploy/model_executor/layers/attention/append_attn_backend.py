"""`layers/attention/append_attn_backend.py`: the launch buffers, which all backends share."""

from __future__ import annotations

from typing import Any

import paddle

from fastdeploy import _counters, _tree

from .base_attention_backend import AttentionBackend

_COUNTS_CPU = ("decoder_num_blocks_cpu", "encoder_num_blocks_x_cpu", "kv_num_blocks_x_cpu")
_COUNTS_DEVICE = ("decoder_num_blocks_device", "decoder_chunk_size_device")
_TILES = ("decoder_batch_ids", "decoder_tile_ids_per_batch", "encoder_batch_ids")
_TILES += ("encoder_tile_ids_per_batch", "kv_batch_ids", "kv_tile_ids_per_batch")


class AppendAttentionBackend(AttentionBackend):
    """The default backend; the double has no model for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def init_attention_metadata(self, forward_meta: Any) -> None:
        raise NotImplementedError


def allocate_launch_related_buffer(
    max_batch_size: int,
    max_model_len: int,
    encoder_block_shape_q: int,
    decoder_block_shape_q: int,
    decoder_step_token_num: int,
    num_heads: int,
    kv_num_heads: int,
    block_size: int,
) -> dict[str, Any]:
    """The launch buffers by their names in share_inputs; those named *_cpu are on the host."""
    assert num_heads % kv_num_heads == 0
    assert max_model_len % block_size == 0
    assert max_model_len % encoder_block_shape_q == 0
    group = num_heads // kv_num_heads
    tiles = max_batch_size * -(-decoder_step_token_num * group // decoder_block_shape_q)
    place = _tree.place()
    buffers = {name: paddle.zeros([tiles], "int32").to(place) for name in _TILES}
    buffers.update({name: paddle.zeros([1], "int32").to(place) for name in _COUNTS_DEVICE})
    for name in _COUNTS_CPU:
        buffers[name] = _counters.on_host(paddle.zeros([1], "int32").cpu())
    maxima = paddle.zeros([6], "int32").cpu()
    buffers["max_len_tensor_cpu"] = _counters.on_host(maxima)
    return buffers
