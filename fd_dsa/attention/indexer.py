"""The lightning indexer: which past tokens a query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paddle import nn

from fd_dsa.attention.layers import LayerNorm, zeros_parameter
from fd_dsa.ops._linear import linear
from fd_dsa.ops.indexer_query import prepare_indexer_query


@dataclass(frozen=True, slots=True)
class IndexerConfig:
    """Sizes of an indexer; `rope_interleave` is the pairing of its RoPE (False for V3.2)."""

    hidden_size: int
    q_lora_rank: int
    index_n_heads: int
    index_head_dim: int
    rope_interleave: bool


class Indexer(nn.Layer):
    """Scores past tokens with a few cheap heads and keeps the best `index_topk`.

    Its rope slice is the FIRST `qk_rope_head_dim` of each head; the key norm is a LayerNorm with
    bias and eps 1e-6. Parameters have FastDeploy's names (docs/design.md, "FastDeploy's contract").

    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2, in the form of Hugging Face transformers 5.23
    (DeepseekV32Indexer).
    """

    def __init__(self, config: IndexerConfig, layer_id: int) -> None:
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = zeros_parameter(self, [config.q_lora_rank, heads * dim])
        self.wk = zeros_parameter(self, [config.hidden_size, dim])
        self.k_norm = LayerNorm(dim, epsilon=1e-6)
        # both scale factors of the scores are folded in when the weight is loaded
        self.weights_proj = zeros_parameter(self, [config.hidden_size, heads])
        self.weights_scale = heads**-0.5 * dim**-0.5

    def key(self, hidden_states: Any) -> Any:
        """Index keys as projected, float32 [num_tokens, index_head_dim]; `write_caches` norms.

        Args:
            hidden_states: float32 [num_tokens, hidden_size], after the input norm.
        """
        return linear(hidden_states, self.wk)

    def forward(self, forward_meta: Any, hidden_states: Any, qr: Any, cos_sin: Any) -> Any:
        """Cache slots that each token attends to; the step's keys are in the cache already.

        Args:
            forward_meta: the runner's object, its step metadata made.
            hidden_states: float32 [num_tokens, hidden_size], after the input norm.
            qr: float32 [num_tokens, q_lora_rank], after its norm.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.

        Returns:
            int32 [num_tokens, topk]; see DSAAttentionBackend.indexer_forward.
        """
        config, backend = self.config, forward_meta.attn_backend
        layout = backend.config.cache_layout
        q, weights = prepare_indexer_query(
            linear(qr, self.wq_b).reshape([-1, config.index_n_heads, config.index_head_dim]),
            linear(hidden_states, self.weights_proj),
            None,
            cos_sin,
            rope_interleave=config.rope_interleave,
            quantized=layout.is_fp8,
            hadamard=layout.index_hadamard,
            scale_fmt=layout.index_scale_fmt,
            out=backend.query_buffers(hidden_states.shape[0]),
        )
        return backend.indexer_forward(q, None, weights, self.layer_id, forward_meta)
