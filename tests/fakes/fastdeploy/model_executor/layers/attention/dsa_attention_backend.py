"""DeepSeek Sparse Attention as FastDeploy has it (`layers/attention/dsa_attention_backend.py`).

The class keeps the contract, of April 2026 or as at 39d329f2 (June); what it does in a step and in
a layer, costs and mistakes included, is in `_upstream_dsa.py`. The BROKEN trees change what a
plug-in checks before it takes over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import paddle

from fastdeploy import _tree

from . import _upstream_dsa
from .base_attention_backend import AttentionBackend, AttentionMetadata
from .utils import init_rank_and_device_id

if _tree.current().defect == "raising_import":
    raise ImportError("libflash_mla.so: cannot open shared object file")


@dataclass
class DSAAttentionMetadata(AttentionMetadata):
    """What the backend keeps of a step."""

    kv_signal_metadata: Any = None
    kv_signal_data_list: list[Any] = field(default_factory=list)


class _Backend(AttentionBackend):
    """What all trees have in common."""

    __infer_dynamic_dims_fields__ = ["attention_metadata"]  # noqa: RUF012 - read by FastDeploy
    attention_metadata: DSAAttentionMetadata

    def _make(self, fd_config: Any, kv_num_heads: int, num_heads: int, head_dim: int) -> None:
        model, cache = fd_config.model_config, fd_config.cache_config
        self.block_size = cache.block_size
        self.max_seq_len = model.max_model_len
        self.rope_theta = model.rope_theta
        self.rope_3d = fd_config.enable_rope_3d_runtime
        self.causal = getattr(model, "causal", True)
        self.num_layers, self.start_layer_index = model.num_hidden_layers, model.start_layer_index
        self.speculative_method = fd_config.speculative_config.method
        self.speculate_max_draft_token_num = fd_config.speculative_config.num_speculative_tokens
        self.keep_pd_step_flag = fd_config.speculative_config.model_type == "mtp"
        self.kv_num_heads, self.num_heads, self.head_dim = kv_num_heads, num_heads, head_dim
        self.kv_lora_rank, self.qk_rope_head_dim = model.kv_lora_rank, model.qk_rope_head_dim
        self.index_head_dim, self.index_topk = model.index_head_dim, model.index_topk
        self.attn_softmax_scale = self._softmax_scale(model)
        self.pd_disaggregation_mode = fd_config.parallel_config.pd_disaggregation_mode
        self.rank, self.device_id = init_rank_and_device_id(fd_config)
        # for the operator that splits work among tiles, which this backend has none of
        self.unused = paddle.zeros([1], "int32").to(_tree.place())
        self.unused_cpu = paddle.zeros([1], "int32").cpu()

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
        """Once a step: the launch operator with its wait, windows where the tree makes them."""
        self.attention_metadata = DSAAttentionMetadata()
        _upstream_dsa.prepare_step(self, forward_meta)

    def get_attention_meta(self) -> DSAAttentionMetadata:
        return self.attention_metadata

    def _shapes(self, max_num_blocks: int) -> tuple[list[int], list[int], list[int]]:
        latent = self.kv_lora_rank + 4 * self.kv_lora_rank // 128 + 2 * self.qk_rope_head_dim
        index = self.index_head_dim + 4 * self.index_head_dim // 128
        return (
            [max_num_blocks, 1, self.block_size, latent],
            [],
            [max_num_blocks, self.block_size, index],
        )


class DSAAttentionBackend(_Backend):
    """The backend of FD_ATTENTION_BACKEND=DSA_ATTN."""

    if _tree.current().defect == "constructor":

        def __init__(
            self,
            fd_config: Any,
            num_kv_heads: int,
            num_heads: int,
            head_dim: int,
            encoder_block_shape_q: int = -1,
            decoder_block_shape_q: int = -1,
        ) -> None:
            self._make(fd_config, num_kv_heads, num_heads, head_dim)

    else:

        def __init__(
            self,
            fd_config: Any,
            kv_num_heads: int,
            num_heads: int,
            head_dim: int,
            encoder_block_shape_q: int = -1,
            decoder_block_shape_q: int = -1,
        ) -> None:
            self._make(fd_config, kv_num_heads, num_heads, head_dim)

    if _tree.current().defect == "cache_shape":

        def get_kv_cache_shape(
            self, max_num_blocks: int, kv_cache_quant_type: str, layer_id: int
        ) -> tuple[list[int], list[int]]:
            shapes = self._shapes(max_num_blocks)
            return shapes[0], shapes[2]

    else:

        def get_kv_cache_shape(
            self, max_num_blocks: int, kv_cache_quant_type: str | None = None
        ) -> tuple[list[int], list[int], list[int]]:
            """Shapes of a layer's key, value (none) and indexer cache."""
            return self._shapes(max_num_blocks)

    if _tree.current().defect == "forward_mixed":

        def forward_mixed(
            self,
            q: Any,
            k: Any,
            v: Any,
            qkv: Any,
            compressed_kv: Any,
            k_pe: Any,
            sinks: Any,
            layer: Any,
            forward_meta: Any,
        ) -> Any:
            return _upstream_dsa.attend(self, q, k, v, compressed_kv, k_pe, layer, forward_meta)

    else:

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
            if not _tree.current().sliding_windows:
                return _upstream_dsa.attend(self, q, k, v, compressed_kv, k_pe, layer, forward_meta)
            # the name in the module, which a plug-in may have bound to its own class
            return DSAAttentionBackend.forward_static(
                q,
                v,
                compressed_kv,
                k_pe,
                forward_meta.caches[2 * layer.layer_id],
                forward_meta,
                self.attn_softmax_scale,
            )

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
            return _upstream_dsa.attend_static(
                q, indexer_topk, compressed_kv, k_pe, latent_cache, forward_meta, attn_softmax_scale
            )

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

        def create_host_kv_cache(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("DSA caches are not swapped to the host")
