"""Multi-head latent attention in absorbed form, over the DSA backend."""

from __future__ import annotations

from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from paddle import nn

from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.attention.indexer import Indexer
from fd_dsa.attention.layers import RMSNorm, WeightLoader, loads, zeros_parameter
from fd_dsa.models.config import ModelConfig
from fd_dsa.ops._gemm import matrix
from fd_dsa.ops._host import as_numpy, readable
from fd_dsa.ops._linear import head_linear, linear
from fd_dsa.ops._norm import rms_norm
from fd_dsa.ops.cache_write import CacheWriteParams


class DeepseekV32DSAAttention(nn.Layer):
    """MLA whose queries see the keys that an indexer chose.

    The up-projection of the keys is absorbed into the query and that of the values into the
    output, so the cache holds one latent of `kv_lora_rank` + `qk_rope_head_dim` values a token,
    shared by all heads. Parameter names follow FastDeploy (docs/design.md,
    "FastDeploy's contract").

    Args:
        config: the model.
        layer_id: index of the layer; a layer of indexer type "shared" has no indexer of its own.

    Source: DeepSeek-V2 (arXiv 2405.04434) §2.1.
    """

    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.q_lora_rank, self.kv_lora_rank = config.q_lora_rank, config.kv_lora_rank
        self.num_heads, self.nope_dim = config.num_attention_heads, config.qk_nope_head_dim
        self.rope_dim, self.v_dim = config.qk_rope_head_dim, config.v_head_dim
        hidden, rank, heads = config.hidden_size, config.kv_lora_rank, config.num_attention_heads
        down = config.q_lora_rank + rank + self.rope_dim
        self.qkv_a_proj_with_mqa = zeros_parameter(self, [hidden, down])
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.mla_norm_eps)
        self.kv_a_layernorm = RMSNorm(rank, config.mla_norm_eps)
        self.q_b_proj = zeros_parameter(self, [config.q_lora_rank, heads * config.qk_head_dim])
        self.k_b_proj = zeros_parameter(self, [heads, self.nope_dim, rank])
        self.v_b_proj = zeros_parameter(self, [heads, rank, self.v_dim])
        self.o_proj = zeros_parameter(self, [heads * self.v_dim, hidden])
        self.qkv_a_bias = self.o_bias = None
        if config.attention_bias:
            self.qkv_a_bias = zeros_parameter(self, [down])
            self.o_bias = zeros_parameter(self, [hidden])
        self.indexer = None
        if config.indexer_types[layer_id] == "full":
            self.indexer = Indexer(config, layer_id)

    @cached_property
    def _bound(self) -> SimpleNamespace:
        """What a step reads of the parameters, as GEMMs and norms do, bound in the first one."""
        return SimpleNamespace(
            down=matrix(self.qkv_a_proj_with_mqa),
            down_bias=None if self.qkv_a_bias is None else readable(self.qkv_a_bias),
            norm=self.q_a_layernorm.bound,
            q_b=matrix(self.q_b_proj),
            k_b=matrix(self.k_b_proj),
            v_b=matrix(self.v_b_proj),
            out=matrix(self.o_proj),
            out_bias=None if self.o_bias is None else readable(self.o_bias),
            indexer=self.indexer,
        )

    def forward(
        self, hidden_states: Any, cos_sin: Any, forward_meta: Any, shared_indices: Any
    ) -> tuple[Any, Any]:
        """Attention output and the selection that a following "shared" layer uses.

        Args:
            hidden_states: float32 [num_tokens, hidden_size], normed.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.
            forward_meta: the runner's object, its step metadata made.
            shared_indices: selection of the nearest layer before with an indexer, or None.

        Returns:
            float32 [num_tokens, hidden_size], int32 [num_tokens, topk].
        """
        backend, bound = forward_meta.attn_backend, self._bound
        indexer = bound.indexer
        if indexer is None:
            qr, kv_a = self._down_projected(hidden_states)
            backend.write(kv_a, None, cos_sin, self, forward_meta)
            indices = shared_indices
        else:
            num_tokens, work = hidden_states.shape[0], partial(self._down_projected, hidden_states)
            side = indexer.project, hidden_states, backend
            (qr, kv_a), (index_k, weights) = backend.overlap.run(num_tokens, work, *side)
            backend.write(kv_a, index_k, cos_sin, self, forward_meta)
            indices = indexer.forward(forward_meta, qr, cos_sin, weights)
        query = self._absorbed_query(qr, cos_sin, backend)
        latent = backend.attend(query, indices, self.layer_id, forward_meta)
        merged = head_linear(latent, bound.v_b).reshape([-1, self.num_heads * self.v_dim])
        return linear(merged, bound.out, bound.out_bias), indices

    def cache_write_params(self, layout: CacheLayout) -> CacheWriteParams:
        """How the keys of this layer are normed and stored in caches of `layout`."""
        norms: dict[str, Any] = {}
        if self.indexer is not None:
            k_norm = self.indexer.k_norm
            norms = {
                "k_norm_weight": readable(k_norm.weight),
                "k_norm_bias": readable(k_norm.bias),
                "k_norm_eps": k_norm.epsilon,
                "index_rope_interleave": self.indexer.config.indexer_rope_interleave,
            }
        return CacheWriteParams(
            layout.kv_cache_dtype,
            kv_norm_weight=readable(self.kv_a_layernorm.weight),
            kv_norm_eps=self.kv_a_layernorm.epsilon,
            index_hadamard=layout.index_hadamard,
            index_scale_fmt=layout.index_scale_fmt,
            **norms,
        )

    def _down_projected(self, hidden_states: Any) -> tuple[Any, Any]:
        """Latent of the queries, normed, and keys of `write_caches`, neither normed nor rotated."""
        bound = self._bound
        qkv = linear(hidden_states, bound.down, bound.down_bias)
        return rms_norm(qkv[:, : self.q_lora_rank], *bound.norm), qkv[:, self.q_lora_rank :]

    def _absorbed_query(self, qr: Any, cos_sin: Any, backend: Any) -> Any:
        """float32 [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]."""
        bound, nope = self._bound, self.nope_dim
        q = linear(qr, bound.q_b).reshape([-1, self.num_heads, nope + self.rope_dim])
        q_latent = head_linear(q[:, :, :nope], bound.k_b)
        return backend.attention.prepare_mla_query(q_latent, q[:, :, nope:], None, cos_sin)

    def weight_loaders(self, prefix: str) -> dict[str, WeightLoader]:
        """Checkpoint names below `prefix` and how each fills its parameter."""
        of_q, of_kv = slice(0, self.q_lora_rank), slice(self.q_lora_rank, None)
        fused, rows = self.qkv_a_proj_with_mqa, slice(None)
        loaders = {
            "q_a_proj.weight": loads(fused, rows, of_q, transpose=True),
            "kv_a_proj_with_mqa.weight": loads(fused, rows, of_kv, transpose=True),
            "q_a_layernorm.weight": loads(self.q_a_layernorm.weight),
            "kv_a_layernorm.weight": loads(self.kv_a_layernorm.weight),
            "q_b_proj.weight": loads(self.q_b_proj, transpose=True),
            "o_proj.weight": loads(self.o_proj, transpose=True),
            "kv_b_proj.weight": self._load_kv_b,
        }
        if self.qkv_a_bias is not None:
            loaders["q_a_proj.bias"] = loads(self.qkv_a_bias, of_q)
            loaders["kv_a_proj_with_mqa.bias"] = loads(self.qkv_a_bias, of_kv)
            loaders["o_proj.bias"] = loads(self.o_bias)
        if self.indexer is not None:
            loaders |= self.indexer.weight_loaders("indexer.")
        return {prefix + name: loader for name, loader in loaders.items()}

    def _load_kv_b(self, array: np.ndarray) -> None:
        """Split kv_b_proj [heads * (nope + v), rank] per head into its key and value part."""
        per_head = array.reshape(self.num_heads, self.nope_dim + self.v_dim, self.kv_lora_rank)
        np.copyto(as_numpy(self.k_b_proj.detach()), per_head[:, : self.nope_dim])
        np.copyto(as_numpy(self.v_b_proj.detach()), per_head[:, self.nope_dim :].transpose(0, 2, 1))
