"""DeepSeek Sparse Attention as FastDeploy has it (`layers/attention/dsa_attention_backend.py`).

The class keeps the contract, of April 2026 or as at 39d329f2 (June): names, parameters, attributes,
shapes of caches. FlashMLA and DeepGEMM, which its methods call, are not part of the double.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import paddle

from fastdeploy import _tree

from .base_attention_backend import AttentionBackend, AttentionMetadata
from .utils import init_rank_and_device_id


@dataclass
class DSAAttentionMetadata(AttentionMetadata):
    """Fields of a step that the backend keeps."""

    kv_signal_metadata: Any = None
    kv_signal_data_list: list[Any] = field(default_factory=list)


class DSAAttentionBackend(AttentionBackend):
    """The backend of FD_ATTENTION_BACKEND=DSA_ATTN."""

    __infer_dynamic_dims_fields__ = ["attention_metadata"]  # noqa: RUF012 - read by FastDeploy
    attention_metadata: DSAAttentionMetadata

    def __init__(
        self,
        fd_config: Any,
        kv_num_heads: int,
        num_heads: int,
        head_dim: int,
        encoder_block_shape_q: int = -1,
        decoder_block_shape_q: int = -1,
    ) -> None:
        model, speculative = fd_config.model_config, fd_config.speculative_config
        self.block_size = fd_config.cache_config.block_size
        self.max_seq_len = model.max_model_len
        self.rope_theta = model.rope_theta
        self.rope_3d = fd_config.enable_rope_3d_runtime
        self.causal = getattr(model, "causal", True)
        self.num_layers, self.start_layer_index = model.num_hidden_layers, model.start_layer_index
        self.num_layers_draft_model = int(speculative.method == "mtp")
        self.speculative_method = speculative.method
        self.speculate_max_draft_token_num = speculative.num_speculative_tokens
        self.keep_pd_step_flag = speculative.model_type == "mtp"
        self.kv_num_heads, self.num_heads, self.head_dim = kv_num_heads, num_heads, head_dim
        self.kv_lora_rank, self.qk_rope_head_dim = model.kv_lora_rank, model.qk_rope_head_dim
        self.index_head_dim, self.index_topk = model.index_head_dim, model.index_topk
        self.quant_block_size = 128
        self.attn_softmax_scale = self._softmax_scale(model)
        self.pd_disaggregation_mode = fd_config.parallel_config.pd_disaggregation_mode
        self.rank, self.device_id = init_rank_and_device_id(fd_config)

    @staticmethod
    def _softmax_scale(model: Any) -> float:
        scale = (model.qk_nope_head_dim + model.qk_rope_head_dim) ** -0.5
        if model.rope_scaling:
            all_dim = model.rope_scaling.get("mscale_all_dim", False)
            # not every rope_scaling has a factor: this raises for those that have none
            factor = model.rope_scaling["factor"]
            if factor > 1:
                m = 0.1 * float(all_dim) * math.log(factor) + 1.0
                scale *= m * m
        return scale

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Once a step; upstream's operator for work lists is not part of the double."""
        self.attention_metadata = DSAAttentionMetadata()

    def get_attention_meta(self) -> DSAAttentionMetadata:
        return self.attention_metadata

    def get_kv_cache_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], list[int], list[int]]:
        """Shapes of a layer's key, value (none) and indexer cache."""
        latent = self.kv_lora_rank + 4 * self.kv_lora_rank // 128 + 2 * self.qk_rope_head_dim
        index = self.index_head_dim + 4 * self.index_head_dim // 128
        return (
            [max_num_blocks, 1, self.block_size, latent],
            [],
            [max_num_blocks, self.block_size, index],
        )

    def forward_mixed(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """[T, H, 512] of absorbed queries [T, H, 576] and what the indexer chose."""
        raise NotImplementedError("the double has none of FlashMLA's kernels")

    if _tree.current().sliding_windows:

        @staticmethod
        def forward_static(
            q: Any,
            indexer_topk: Any,
            compressed_kv: Any,
            k_pe: Any,
            latent_cache: Any,
            forward_meta: Any,
            attn_softmax_scale: float,
        ) -> Any:
            """`forward_mixed` for layers without a backend of their own (#8060, #8090)."""
            raise NotImplementedError("the double has none of FlashMLA's kernels")

    if _tree.current().v1_cache_manager:

        def create_kv_cache(
            self,
            num_layers: int,
            num_blocks: int,
            cache_dtype: str,
            kv_cache_quant_type: str | None = None,
            layer_offset: int = 0,
        ) -> dict[tuple[str, int], Any]:
            """Bytes, whatever `cache_dtype` says (#7787)."""
            key_shape, _, indexer_shape = self.get_kv_cache_shape(num_blocks, kv_cache_quant_type)
            shapes = {"key": key_shape, "indexer": indexer_shape}
            return {
                (role, layer_offset + layer): paddle.zeros(shape, "uint8")
                for layer in range(num_layers)
                for role, shape in shapes.items()
            }
