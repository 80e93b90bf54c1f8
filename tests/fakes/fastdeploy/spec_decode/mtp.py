"""The proposer with a model of its own, up to where a DSA model ends it.

Source: `spec_decode/mtp.py` at 39d329f2; the ForwardMeta of drafts, `spec_decode/mtp_cuda.py` at
177cb140, which gives them neither positions nor slots.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import paddle

from fastdeploy.model_executor.layers.attention import get_attention_backend


class MTPProposer:
    """Has a second backend; without the V1 cache manager two caches: keys and values."""

    def __init__(
        self,
        fd_config: Any,
        main_model: Any,
        local_rank: int,
        device_id: int,
        target_model_inputs: Any,
    ) -> None:
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
        if not main_model.enable_cache_manager_v1:
            self.initialize_kv_cache(main_model.num_gpu_blocks)

    def initialize_kv_cache(self, main_model_num_blocks: int, profile: bool = False) -> None:
        """Unpacks two shapes: a DSA backend, which has three, cannot start here."""
        key_shape, value_shape = self.attn_backends[0].get_kv_cache_shape(
            max_num_blocks=main_model_num_blocks, kv_cache_quant_type=None
        )
        self.caches = [paddle.zeros(shape, dtype="uint8") for shape in (key_shape, value_shape)]
