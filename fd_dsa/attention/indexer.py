"""The lightning indexer: which past tokens a query attends to."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from paddle import nn

from fd_dsa.attention.layers import LayerNorm, WeightLoader, loads, zeros_parameter
from fd_dsa.ops._gemm import HostMatrix, matrix
from fd_dsa.ops._linear import linear
from fd_dsa.ops.providers import serving


class Indexer(nn.Layer):
    """Scores past tokens with a few cheap heads and keeps the best `index_topk`.

    Its rope slice is the FIRST `qk_rope_head_dim` of each head; the key norm is a LayerNorm with
    bias and eps 1e-6. Parameters have FastDeploy's names (docs/design.md, "FastDeploy's contract"),
    except `wk_weights_proj`: its `wk` and `weights_proj` side by side, for one GEMM.

    Args:
        config: the model's, of which sizes and `indexer_rope_interleave`, the pairing of the RoPE
            (False for V3.2), are read.
        layer_id: index of the layer.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2, in the form of Hugging Face transformers 5.23
    (DeepseekV32Indexer).
    """

    def __init__(self, config: Any, layer_id: int) -> None:
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = zeros_parameter(self, [config.q_lora_rank, heads * dim])
        self.wk_weights_proj = zeros_parameter(self, [config.hidden_size, dim + heads])
        self.k_norm = LayerNorm(dim, epsilon=1e-6)
        # both scale factors of the scores are folded in when the weight is loaded
        self.weights_scale = heads**-0.5 * dim**-0.5

    @cached_property
    def _weights(self) -> tuple[Any, Any]:
        """`wk_weights_proj`, on a device its two halves, and `wq_b`, as they are read."""
        both, dim = matrix(self.wk_weights_proj), self.config.index_head_dim
        if not isinstance(both, HostMatrix):
            both = both[:, :dim], both[:, dim:]
        return both, matrix(self.wq_b)

    def project(self, hidden_states: Any, backend: Any) -> tuple[Any, Any]:
        """Index keys and head weights as projected; `write_caches` norms the keys.

        They need only the hidden states, so they may run beside other projections, see
        IndexerOverlap.

        Args:
            hidden_states: float32 [num_tokens, hidden_size], after the input norm.
            backend: on a device the results are in its `projection_buffers`.

        Returns:
            float32 [num_tokens, index_head_dim] and [num_tokens, index_n_heads].
        """
        weights, dim = self._weights[0], self.config.index_head_dim
        if not isinstance(weights, HostMatrix):
            out = backend.projection_buffers(hidden_states.shape[0])
            project = serving("indexer_projection", hidden_states)
            return project(hidden_states, *weights, out=out)  # type: ignore[no-any-return]
        both = weights.times(hidden_states)
        return both[:, :dim], both[:, dim:]

    def forward(self, forward_meta: Any, qr: Any, cos_sin: Any, precomputed_weights: Any) -> Any:
        """Cache slots that each token attends to; the step's keys are in the cache already.

        Args:
            forward_meta: the runner's object, its step metadata made.
            qr: float32 [num_tokens, q_lora_rank], after its norm.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.
            precomputed_weights: float32 [num_tokens, index_n_heads], of `project`.

        Returns:
            int32 [num_tokens, topk]; see DSAAttentionBackend.select.
        """
        config, backend = self.config, forward_meta.attn_backend
        layout = backend.config.cache_layout
        q = linear(qr, self._weights[1])
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

    def weight_loaders(self, prefix: str) -> dict[str, WeightLoader]:
        """Checkpoint names below `prefix` and how each fills its parameter, or its part of one."""
        both, dim, rows = self.wk_weights_proj, self.config.index_head_dim, slice(None)
        columns, scale = slice(dim, None), self.weights_scale
        loaders = {
            "wq_b.weight": loads(self.wq_b, transpose=True),
            "wk.weight": loads(both, rows, slice(0, dim), transpose=True),
            "k_norm.weight": loads(self.k_norm.weight),
            "k_norm.bias": loads(self.k_norm.bias),
            "weights_proj.weight": loads(both, rows, columns, transpose=True, scale=scale),
        }
        return {prefix + name: loader for name, loader in loaders.items()}
