"""Multi-head latent attention (MLA) in absorbed form, over the DSA backend."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from fd_dsa.attention.indexer import Indexer
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.errors import KernelUnavailable
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.dequantize import BLOCK
from fd_dsa.models.weights_protocol import Weights
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.linear import linear, values_of


def down_projections(config: ModelConfig, prefix: str, fp8: Collection[str]) -> dict[str, int]:
    """Return names and rows of the weights of an attention's first GEMM, in order.

    The indexer's wk is one of them if all are FP8 and the first two end at blocks of scales. It is
    between q_a_proj and kv_a_proj_with_mqa, which may end within a block. A model with biases has
    wk apart, because it has none.

    Args:
        prefix: start of the names.
        fp8: names of the tensors that are held as FP8 if their places allow it.
    """
    rows = {
        "q_a_proj": config.q_lora_rank,
        "indexer.wk": config.index_head_dim,
        "kv_a_proj_with_mqa": config.kv_lora_rank + config.qk_rope_head_dim,
    }
    parts = {f"{prefix}{name}.weight": count for name, count in rows.items()}
    ends_at_blocks = config.q_lora_rank % BLOCK == config.index_head_dim % BLOCK == 0
    if config.attention_bias or not ends_at_blocks or not all(name in fp8 for name in parts):
        del parts[f"{prefix}indexer.wk.weight"]
    return parts


class DeepseekV32DSAAttention:
    """MLA whose queries attend to the keys that an indexer selects.

    The query absorbs the up-projection of the keys, the output that of the values. So the cache
    holds one latent of `kv_lora_rank` + `qk_rope_head_dim` values per token for all heads.
    A layer of indexer type "shared" has no indexer of its own.

    Attributes:
        qkv_a_proj: weight of the joined down-projections, see `down_projections`.
        q_b_proj, k_b_proj, v_b_proj, o_proj: weights under the checkpoint's names, `kv_b_proj` in
            two parts.
        q_a_layernorm, kv_a_layernorm: norms of the latents.
        indexer: indexer of the layer, None in a layer of type "shared".

    Source: DeepSeek-V2 (arXiv 2405.04434) §2.1.
    """

    def __init__(self, config: ModelConfig, layer_id: int, weights: Weights, prefix: str) -> None:
        self.layer_id = layer_id
        self.q_lora_rank, self.num_heads = config.q_lora_rank, config.num_attention_heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        hidden, rank, heads = config.hidden_size, config.kv_lora_rank, config.num_attention_heads
        values = heads * config.v_head_dim

        down = down_projections(config, prefix, weights.fp8)
        self.qkv_a_proj = weights.matrix(hidden, down)
        self._kv_begin = sum(down.values()) - rank - self.rope_dim
        eps = config.rms_norm_eps
        self.q_a_layernorm = weights.norm(f"{prefix}q_a_layernorm.weight", config.q_lora_rank, eps)
        self.kv_a_layernorm = weights.norm(f"{prefix}kv_a_layernorm.weight", rank, eps)
        self.q_b_proj = weights.matrix(
            config.q_lora_rank, {f"{prefix}q_b_proj.weight": heads * config.qk_head_dim}
        )
        self.k_b_proj, self.v_b_proj = weights.by_head(
            f"{prefix}kv_b_proj.weight", heads, self.nope_dim, config.v_head_dim, rank
        )
        self.o_proj = weights.matrix(values, {f"{prefix}o_proj.weight": hidden})
        self.qkv_a_bias = self.o_bias = None
        if config.attention_bias:
            biases = {f"{name.removesuffix('weight')}bias": n for name, n in down.items()}
            self.qkv_a_bias = weights.bias(biases)
            out_bias = weights.bias({f"{prefix}o_proj.bias": hidden})
            # one rank adds it to the sum over all
            self.o_bias = out_bias if weights.group.rank == 0 else None
        self.indexer = None
        if config.indexer_types[layer_id] == "full":
            has_wk = self._kv_begin == self.q_lora_rank
            self.indexer = Indexer(config, layer_id, weights, f"{prefix}indexer.", has_wk)

    def forward(
        self, hidden_states: Any, cos_sin: Any, forward_meta: Any, shared_indices: Any
    ) -> tuple[Any, Any]:
        """Return the attention output, and the selection for following "shared" layers.

        Args:
            hidden_states: [num_tokens, hidden_size], normed.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.
            shared_indices: selection of the nearest layer before with an indexer, or None.
        """
        backend, indexer = forward_meta.attn_backend, self.indexer
        num_tokens = hidden_states.shape[0]
        if indexer is None:
            qr, kv_a, _ = self.project_qkv_a(hidden_states)
            backend.write(kv_a, None, cos_sin, self, forward_meta)
            indices = shared_indices
        else:
            work = partial(self.project_qkv_a, hidden_states)
            # the weights of the indexer are not FP8
            values = values_of(hidden_states)
            forked = num_tokens if indexer.may_fork(values) else 0
            (qr, kv_a, joined), (index_k, weights) = backend.overlap.run(
                forked, work, indexer.project, values, backend
            )
            index_k = index_k if joined is None else joined
            backend.write(kv_a, index_k, cos_sin, self, forward_meta)
            indices = None
            prompts = backend.attention.dense_prompts
            if prompts is None or not prompts.has_all:
                indices = indexer.forward(forward_meta, qr, cos_sin, weights)
        try:
            merged = self._attended(qr, cos_sin, indices, forward_meta)
        except KernelUnavailable as error:
            backend.attention.attend_in_one_form(error)
            if indices is None and indexer is not None:
                indices = indexer.forward(forward_meta, qr, cos_sin, weights)
            merged = self._attended(qr, cos_sin, indices, forward_meta)
        return linear(merged, self.o_proj, self.o_bias), indices

    def cache_write_params(self, layout: CacheLayout) -> CacheWriteParams:
        """Return the norms and the format with which the layer writes its keys."""
        norms: dict[str, Any] = {}
        if self.indexer is not None:
            norms = self.indexer.key_norm()
        return CacheWriteParams(
            layout.kv_cache_dtype,
            kv_norm_weight=self.kv_a_layernorm.weight,
            kv_norm_eps=self.kv_a_layernorm.epsilon,
            index_hadamard=layout.index_hadamard,
            index_scale_fmt=layout.index_scale_fmt,
            **norms,
        )

    def project_qkv_a(self, hidden_states: Any) -> tuple[Any, Any, Any]:
        """Project to the latent of the queries, the key latent and the index key.

        Returns:
            The latent of the queries, normed, then the keys for `write_caches`, neither normed nor
            rotated. The index key is None if the indexer projects it itself.
        """
        qkv = linear(hidden_states, self.qkv_a_proj, self.qkv_a_bias)
        rank, begin = self.q_lora_rank, self._kv_begin
        index_k = qkv[:, rank:begin] if begin > rank else None
        return self.q_a_layernorm.of(qkv[:, :rank]), qkv[:, begin:], index_k

    def _attended(self, qr: Any, cos_sin: Any, indices: Any, forward_meta: Any) -> Any:
        """Return the values of all heads, [num_tokens, num_heads * v_head_dim]."""
        backend, nope = forward_meta.attn_backend, self.nope_dim
        q = self.q_b_proj.times(qr).reshape([-1, self.num_heads, nope + self.rope_dim])
        prompts, tokens = backend.attention.dense_prompts, None
        where: tuple[Any, ...] = ()
        if prompts is not None and prompts.groups:
            merged = backend.attend_densely(
                q, cos_sin, (self.k_b_proj, self.v_b_proj), self.o_proj, self.layer_id, forward_meta
            )
            if prompts.has_all:
                return merged
            tokens = prompts.others
            q, where = prompts.of_others(q), (merged, tokens)
        q_latent = self.k_b_proj.times_by_head(q[:, :, :nope])
        query = backend.attention.prepare_mla_query(q_latent, q[:, :, nope:], tokens, cos_sin)
        latent = backend.attend(query, indices, self.layer_id, forward_meta)
        return self.v_b_proj.heads_joined(latent, self.o_proj, *where)
