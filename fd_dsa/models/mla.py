"""Multi-head latent attention (MLA) in absorbed form, and the indexer that selects its keys."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.dequantize import BLOCK
from fd_dsa.models.weights_protocol import Weights
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.host_gemm import HostMatrix
from fd_dsa.ops.linear import Linear
from fd_dsa.tensor import Array, StepArray


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


class Indexer:
    """Projections of a lightning indexer, whose few cheap heads score past tokens.

    Its rope slice is the FIRST `qk_rope_head_dim` of each head. The key norm is a LayerNorm with
    bias and eps 1e-6.

    Args:
        config: configuration of the model.
        layer_id: number of the layer.
        weights: weights of the model; `wk` and `weights_proj` are one GEMM.
        prefix: start of the weights' names.
        has_wk: False if `wk` is one of the attention's own projections.

    Attributes:
        wk_weights_proj: weight of the joined projections of keys and head weights. On a device it
            is a tuple of their tensors, without `wk` if `has_wk` is False.
        rope_interleave: pairing of the RoPE. True pairs neighbours, False (V3.2) the two halves.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2; Hugging Face transformers 5.23
    (DeepseekV32Indexer).
    """

    def __init__(
        self, config: ModelConfig, layer_id: int, weights: Weights, prefix: str, has_wk: bool
    ) -> None:
        self.layer_id, self.rope_interleave = layer_id, config.indexer_rope_interleave
        self._heads, self._width = config.index_n_heads, config.index_head_dim
        heads, width = self._heads, self._width
        parts = {f"{prefix}wq_b.weight": heads * width}
        self._wq_b: Linear = weights.matrix(config.q_lora_rank, parts)
        self._key_width = width if has_wk else 0
        parts = {f"{prefix}wk.weight": width} if has_wk else {}
        parts[f"{prefix}weights_proj.weight"] = heads
        # loading folds both scale factors of the scores into the weight
        factors = {f"{prefix}weights_proj.weight": heads**-0.5 * width**-0.5}
        self.wk_weights_proj: HostMatrix | tuple[Array, ...] = weights.columns(
            config.hidden_size, parts, factors
        )
        self._k_norm: dict[str, Any] = {
            "k_norm_weight": weights.vector({f"{prefix}k_norm.weight": width}),
            "k_norm_bias": weights.vector({f"{prefix}k_norm.bias": width}),
            "k_norm_eps": 1e-6,
        }

    def key_norm(self) -> dict[str, Any]:
        """Return norm and rotation of the keys, as arguments of CacheWriteParams."""
        return self._k_norm | {"index_rope_interleave": self.rope_interleave}

    def project(
        self,
        hidden_states: StepArray,
        by: Callable[..., tuple[Array, Array]] | None = None,
        out: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Project hidden states to index keys and head weights, see IndexerLayer."""
        weights, width = self.wk_weights_proj, self._key_width
        if isinstance(weights, HostMatrix):
            both = weights.matmul(hidden_states)
            return both[:, :width], both[:, width:]
        assert by is not None, "the attention of a device selects the function"
        wk, weights_proj = weights if width else (None, *weights)
        return by(hidden_states, wk, weights_proj, out=out)

    def queries(self, latent: Array) -> Array:
        """Project latents to queries, see IndexerLayer."""
        return self._wq_b.matmul(latent).reshape([-1, self._heads, self._width])


def _biased(y: StepArray, bias: StepArray | None) -> StepArray:
    """Return y [num_tokens, out] plus a bias [out], or y if there is none."""
    return y if bias is None else y + bias


class DeepseekV32DSAAttention:
    """MLA over the keys that an indexer selects. The attention backend runs its projections.

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
            is_first = weights.group is None or weights.group.rank == 0
            self.o_bias = out_bias if is_first else None
        self.indexer: Indexer | None = None
        if config.indexer_types[layer_id] == "full":
            has_wk = self._kv_begin == self.q_lora_rank
            self.indexer = Indexer(config, layer_id, weights, f"{prefix}indexer.", has_wk)

    def forward(
        self,
        hidden_states: Array,
        cos_sin: Array,
        forward_meta: LayerStep,
        shared_indices: Array | None,
    ) -> tuple[Array, Array | None]:
        """Return the attention output, and the selection for following "shared" layers.

        Args:
            hidden_states: [num_tokens, hidden_size], normed.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.
            forward_meta: step whose metadata was built last.
            shared_indices: selection of the nearest layer before with an indexer, or None.
        """
        values, indices = forward_meta.attn_backend.forward(
            self, hidden_states, cos_sin, forward_meta, shared_indices
        )
        return _biased(self.o_proj.matmul(values), self.o_bias), indices

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

    def project_qkv_a(self, hidden_states: Array) -> tuple[Array, Array, Array | None]:
        """Project to the latent of the queries, the key latent and the index key.

        Returns:
            The normed latent of the queries; then the keys for `write_caches`, neither normed nor
            rotated. The index key is None if the indexer must project it.
        """
        qkv = _biased(self.qkv_a_proj.matmul(hidden_states), self.qkv_a_bias)
        rank, begin = self.q_lora_rank, self._kv_begin
        index_k = qkv[:, rank:begin] if begin > rank else None
        return self.q_a_layernorm.normalize(qkv[:, :rank]), qkv[:, begin:], index_k

    def queries(self, latent: Array) -> Array:
        """Project latents to queries, see MlaLayer."""
        width = self.nope_dim + self.rope_dim
        return self.q_b_proj.matmul(latent).reshape([-1, self.num_heads, width])
