"""`layers/attention/append_attn_backend.py`: the launch buffers, which all backends share."""

from __future__ import annotations

from typing import Any

import paddle

from .base_attention_backend import AttentionBackend


class AppendAttentionBackend(AttentionBackend):
    """The default backend; the double has no model for it."""


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
    """The one launch buffer that models read; upstream has eleven more for its own kernels."""
    assert num_heads % kv_num_heads == 0
    assert max_model_len % block_size == 0
    assert max_model_len % encoder_block_shape_q == 0
    return {"max_len_tensor_cpu": paddle.zeros([6], "int32").cpu()}
