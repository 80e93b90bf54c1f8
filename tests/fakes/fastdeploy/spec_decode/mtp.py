"""The proposer with a model of its own (`spec_decode/mtp.py`), up to where a DSA model ends it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import paddle

from fastdeploy.model_executor.layers.attention import get_attention_backend


class MTPProposer:
    """Has a second backend, and two caches a layer of its draft model: keys and values."""

    def __init__(self, fd_config: Any, main_model: Any) -> None:
        # a configuration of its own, by which the backend knows whose it is
        fd_config = deepcopy(fd_config)
        model = fd_config.model_config
        fd_config.speculative_config.model_type = "mtp"
        model.start_layer_index, model.num_hidden_layers = model.num_hidden_layers, 1
        self.fd_config = fd_config
        self.attn_backends = [
            get_attention_backend()(
                fd_config,
                kv_num_heads=model.num_key_value_heads,
                num_heads=model.num_attention_heads,
                head_dim=model.head_dim,
                encoder_block_shape_q=64,
                decoder_block_shape_q=16,
            )
        ]
        self.initialize_kv_cache(main_model.num_gpu_blocks)

    def initialize_kv_cache(self, main_model_num_blocks: int) -> None:
        """Unpacks two shapes: a DSA backend, which has three, cannot start here."""
        key_shape, value_shape = self.attn_backends[0].get_kv_cache_shape(
            max_num_blocks=main_model_num_blocks, kv_cache_quant_type=None
        )
        self.caches = [paddle.zeros(shape, dtype="uint8") for shape in (key_shape, value_shape)]
