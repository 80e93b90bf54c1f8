"""Weights of the lightning indexer, which selects the keys of a query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fd_dsa.device.allocation import Array
from fd_dsa.ops.host_gemm import HostMatrix
from fd_dsa.ops.linear import Linear
from fd_dsa.ops.providers import TRITON, provider_of, serving


class IndexerConfig(Protocol):
    """Sizes of a model that its indexers depend on."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    @property
    def q_lora_rank(self) -> int:
        """Width of the queries' latent."""

    @property
    def index_n_heads(self) -> int:
        """Heads of the indexer."""

    @property
    def index_head_dim(self) -> int:
        """Width of a head of the indexer."""

    @property
    def indexer_rope_interleave(self) -> bool:
        """Pairing of the RoPE: True pairs neighbours, False (V3.2) pairs the two halves."""


class IndexerWeights(Protocol):
    """Weights of a model by their names, in host or in device memory."""

    def matrix(self, in_width: int, parts: Mapping[str, int]) -> Linear:
        """Make the weight of one GEMM, whose outputs are those of the parts side by side."""

    def columns(
        self, in_width: int, parts: Mapping[str, int], factors: Mapping[str, float]
    ) -> HostMatrix | tuple[Array, ...]:
        """Make one weight on a CPU, or on a device a tensor [in, out] for each part."""

    def vector(self, parts: Mapping[str, int]) -> Array:
        """Make float32 vectors end to end."""


class Indexer:
    """Projections of an indexer: a few cheap heads score past tokens.

    Its rope slice is the FIRST `qk_rope_head_dim` of each head; the key norm is a LayerNorm with
    bias and eps 1e-6.

    Args:
        config: configuration of the model.
        layer_id: number of the layer.
        weights: of the model; `wk` and `weights_proj` are one GEMM.
        prefix: first part of the weights' names.
        has_wk: False if `wk` is one of the attention's own projections.

    Attributes:
        wk_weights_proj: weight of the joined projections of keys and head weights; on a device a
            tensor of each, or of the second one if `has_wk` is False.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2, in the form of Hugging Face transformers 5.23
    (DeepseekV32Indexer).
    """

    def __init__(
        self,
        config: IndexerConfig,
        layer_id: int,
        weights: IndexerWeights,
        prefix: str,
        has_wk: bool,
    ) -> None:
        self.config, self.layer_id = config, layer_id
        heads, dim = config.index_n_heads, config.index_head_dim
        self._wq_b = weights.matrix(config.q_lora_rank, {f"{prefix}wq_b.weight": heads * dim})
        self._key_width = dim if has_wk else 0
        parts = {f"{prefix}wk.weight": dim} if has_wk else {}
        parts[f"{prefix}weights_proj.weight"] = heads
        # both scale factors of the scores are folded in when the weight is loaded
        factors = {f"{prefix}weights_proj.weight": heads**-0.5 * dim**-0.5}
        self.wk_weights_proj = weights.columns(config.hidden_size, parts, factors)
        self._k_norm: dict[str, Any] = {
            "k_norm_weight": weights.vector({f"{prefix}k_norm.weight": dim}),
            "k_norm_bias": weights.vector({f"{prefix}k_norm.bias": dim}),
            "k_norm_eps": 1e-6,
        }

    def key_norm(self) -> dict[str, Any]:
        """Return how the keys are normed and rotated, as arguments of CacheWriteParams."""
        return self._k_norm | {"index_rope_interleave": self.config.indexer_rope_interleave}

    def may_fork(self, hidden_states: Array) -> bool:
        """Return whether `project` may run on a second stream, as one launch.

        A GEMM of Paddle goes to the stream of its cuBLAS handle, which a fork does not change.
        """
        return provider_of("indexer_projection", hidden_states) == TRITON

    def project(
        self, hidden_states: Array, out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        """Project hidden states to index keys and head weights.

        The call may run alongside other projections, see IndexerOverlap.

        Args:
            hidden_states: [num_tokens, hidden_size], after the input norm.
            out: memory of the two results on a device; None on a CPU.

        Returns:
            [num_tokens, index_head_dim], not normed, and meaningless without `wk`; and
            [num_tokens, index_n_heads].
        """
        weights, width = self.wk_weights_proj, self._key_width
        if isinstance(weights, HostMatrix):
            both = weights.times(hidden_states)
            return both[:, :width], both[:, width:]
        project = serving("indexer_projection", hidden_states)
        wk, weights_proj = weights if width else (None, *weights)
        return project(hidden_states, wk, weights_proj, out=out)

    def queries(self, latent: Array) -> Array:
        """Project normed latents [num_tokens, q_lora_rank] to the queries of all heads.

        Returns:
            [num_tokens, index_n_heads, index_head_dim], not rotated.
        """
        heads, width = self.config.index_n_heads, self.config.index_head_dim
        return self._wq_b.times(latent).reshape([-1, heads, width])
