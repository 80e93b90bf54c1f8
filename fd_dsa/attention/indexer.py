"""The lightning indexer: which past tokens a query attends to."""

from __future__ import annotations

from typing import Any

from fd_dsa.ops.host_gemm import HostMatrix
from fd_dsa.ops.providers import TRITON, provider_of, serving


class Indexer:
    """Scores past tokens with a few cheap heads and keeps the best `index_topk`.

    Its rope slice is the FIRST `qk_rope_head_dim` of each head; the key norm is a LayerNorm with
    bias and eps 1e-6.

    Args:
        config: the model's, of which sizes and `indexer_rope_interleave`, the pairing of the RoPE
            (False for V3.2), are read.
        weights: make what is asked for; `wk` and `weights_proj` are one GEMM.
        has_wk: False where `wk` is one of the attention's own projections.

    Attributes:
        wk_weights_proj: weight of the joined projections of keys and head weights; on a device a
            sequence of both, or of the second one if `has_wk` is False.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2, in the form of Hugging Face transformers 5.23
    (DeepseekV32Indexer).
    """

    def __init__(self, config: Any, layer_id: int, weights: Any, prefix: str, has_wk: bool) -> None:
        self.config, self.layer_id = config, layer_id
        heads, dim = config.index_n_heads, config.index_head_dim
        self._wq_b = weights.matrix(config.q_lora_rank, {f"{prefix}wq_b.weight": heads * dim})
        self._key_width = dim if has_wk else 0
        parts = {f"{prefix}wk.weight": dim} if has_wk else {}
        parts[f"{prefix}weights_proj.weight"] = heads
        # both scale factors of the scores are folded in when the weight is loaded
        factors = {f"{prefix}weights_proj.weight": heads**-0.5 * dim**-0.5}
        self.wk_weights_proj = weights.columns(config.hidden_size, parts, factors)
        self._k_norm = {
            "k_norm_weight": weights.vector({f"{prefix}k_norm.weight": dim}),
            "k_norm_bias": weights.vector({f"{prefix}k_norm.bias": dim}),
            "k_norm_eps": 1e-6,
        }

    def key_norm(self) -> dict[str, Any]:
        """How the keys are normed and rotated, as arguments of CacheWriteParams."""
        return self._k_norm | {"index_rope_interleave": self.config.indexer_rope_interleave}

    def may_fork(self, hidden_states: Any) -> bool:
        """True if `project` may run on a second stream: it is one launch that allocates nothing.

        A GEMM of Paddle goes to the stream of its cuBLAS handle, which a fork does not change.
        """
        return provider_of("indexer_projection", hidden_states) == TRITON

    def project(self, hidden_states: Any, backend: Any) -> tuple[Any, Any]:
        """Index keys [num_tokens, index_head_dim] and head weights [num_tokens, index_n_heads].

        Of hidden states [num_tokens, hidden_size] after the input norm, so it may run beside other
        projections, see IndexerOverlap. Keys are not normed, without `wk` of no meaning; on a
        device both are in `projection_buffers`.
        """
        weights, width = self.wk_weights_proj, self._key_width
        if not isinstance(weights, HostMatrix):
            out = backend.attention.projection_buffers(hidden_states.shape[0])
            project = serving("indexer_projection", hidden_states)
            wk, weights_proj = weights if width else (None, *weights)
            return project(hidden_states, wk, weights_proj, out=out)  # type: ignore[no-any-return]
        both = weights.times(hidden_states)
        return both[:, :width], both[:, width:]

    def forward(self, forward_meta: Any, qr: Any, cos_sin: Any, precomputed_weights: Any) -> Any:
        """Cache slots that each token attends to; the step's keys are in the cache already.

        Args:
            qr: [num_tokens, q_lora_rank], after its norm.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.
            precomputed_weights: float32 [num_tokens, index_n_heads], of `project`.

        Returns:
            int32 [num_tokens, topk]; see DSAAttentionBackend.select.
        """
        config, backend = self.config, forward_meta.attn_backend
        layout = backend.config.cache_layout
        q = self._wq_b.times(qr)
        q, weights = backend.attention.prepare_indexer_query(
            q.reshape([-1, config.index_n_heads, config.index_head_dim]),
            precomputed_weights,
            None,
            cos_sin,
            rope_interleave=config.indexer_rope_interleave,
            quantized=layout.is_fp8,
            hadamard=layout.index_hadamard,
            scale_fmt=layout.index_scale_fmt,
        )
        return backend.select(q, weights, self.layer_id, forward_meta)
