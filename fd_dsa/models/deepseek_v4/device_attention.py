"""Attention of DeepSeek-V4 on a device: the weights and projections of a layer."""

from __future__ import annotations

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.models.deepseek_v4.config import CSA, WINDOW, DeepseekV4Config
from fd_dsa.models.weights_protocol import Weights
from fd_dsa.tensor import Normed, Tensor


class DeviceCompressor:
    """Weights of one compressor apart from its projections.

    Attributes:
        gates: float32 [ratio * halves * width], added to the gates of a token's source.
        norm: float32 [width].
    """

    def __init__(self, config: DeepseekV4Config, kind: str, weights: Weights, prefix: str) -> None:
        is_index = ".indexer." in prefix
        self._prefix = prefix
        self._width = config.index_head_dim if is_index else config.head_dim
        self._halves = 2 if kind == CSA else 1
        num_gates = config.compress_rates[kind] * self._halves * self._width
        self.gates: Tensor = weights.vector({f"{prefix}ape": num_gates})
        self.norm: Tensor = weights.vector({f"{prefix}norm.weight": self._width})

    @property
    def parts(self) -> dict[str, int]:
        """Names and rows of the projections to a source: values, then gates."""
        rows = self._halves * self._width
        return {f"{self._prefix}{name}.weight": rows for name in ("wkv", "wgate")}


class DeviceV4Attention:
    """Attention of one layer. The backend owns its caches, and runs the projections.

    Attributes:
        sinks: float32 [num_heads], logit of a key without a value.
        kv_norm: float32 [head_dim], weight of the keys' RMSNorm.
        compressor, index_compressor: None in a window-only layer, the second also in an HCA layer.
    """

    def __init__(
        self, config: DeepseekV4Config, layer_id: int, weights: Weights, prefix: str
    ) -> None:
        self.layer_id, kind = layer_id, config.layer_types[layer_id]
        self._heads, self._width = config.num_attention_heads, config.head_dim
        self._rank, self._groups = config.q_lora_rank, config.o_groups
        hidden, rank = config.hidden_size, config.q_lora_rank
        down = {f"{prefix}wq_a.weight": rank, f"{prefix}wkv.weight": self._width}
        self._down = weights.matrix(hidden, down)
        self._q_norm = weights.norm(f"{prefix}q_norm.weight", rank, config.rms_norm_eps)
        self._q_b = weights.matrix(rank, {f"{prefix}wq_b.weight": self._heads * self._width})
        self.kv_norm: Tensor = weights.vector({f"{prefix}kv_norm.weight": self._width})
        self.sinks: Tensor = weights.vector({f"{prefix}attn_sink": self._heads})
        self.compressor: DeviceCompressor | None = None
        self.index_compressor: DeviceCompressor | None = None
        # projections in bfloat16: sources of the compressors, then weights of the indexer's heads
        beside: dict[str, int] = {}
        if kind != WINDOW:
            self.compressor = DeviceCompressor(config, kind, weights, f"{prefix}compressor.")
            beside |= self.compressor.parts
            if kind == CSA:
                name = f"{prefix}indexer.compressor."
                self.index_compressor = DeviceCompressor(config, kind, weights, name)
                beside |= self.index_compressor.parts
        self._source = sum(beside.values())
        if kind == CSA:
            self._index_heads, rows = config.index_n_heads, config.index_head_dim
            name = f"{prefix}indexer.wq_b.weight"
            self._index_b = weights.matrix(rank, {name: self._index_heads * rows})
            # a factor of all scores changes no selection
            beside[f"{prefix}indexer.weights_proj.weight"] = self._index_heads
        self._beside = weights.matrix(hidden, beside, sums_in_float32=True) if beside else None
        group, low = self._heads * self._width // self._groups, config.o_lora_rank
        self._out_a = weights.grouped(f"{prefix}wo_a.weight", self._groups, group, low)
        self._out_b = weights.matrix(self._groups * low, {f"{prefix}wo_b.weight": hidden})

    def forward(self, x: Tensor | Normed, forward_meta: LayerStep) -> Tensor:
        """Return the attention output [num_tokens, hidden_size] of normed inputs."""
        attended, _ = forward_meta.attn_backend.forward(self, x, None, forward_meta)
        grouped = attended.reshape([attended.shape[0], self._groups, -1])
        low = self._out_a.matmul_join_heads(grouped, self._out_b)
        out: Tensor = self._out_b.matmul(low)
        return out

    def project(
        self, x: Tensor | Normed
    ) -> tuple[Tensor | Normed, Tensor, Tensor | None, Tensor | None]:
        """Multiply the layer's input by all weights that read it.

        All results but the first may be columns of wider rows.

        Returns:
            Normed latents of the queries, [num_tokens, q_lora_rank]. Then keys [num_tokens,
            head_dim], neither normed nor rotated. Then sources of the compressors, float32
            [num_tokens, values of a source], None without a compressor. Then weights of the
            indexer's heads, float32 [num_tokens, index_n_heads], None without an indexer.
        """
        sources = head_weights = None
        if self._beside is None:
            both = self._down.matmul(x)
        else:
            both, sources = self._down.matmul_beside(x, self._beside)
            if self.index_compressor is not None:
                sources, head_weights = sources[:, : self._source], sources[:, self._source :]
        latent = self._q_norm.normalize(both[:, : self._rank])
        return latent, both[:, self._rank :], sources, head_weights

    def queries(self, latent: Tensor | Normed) -> Tensor:
        """Project latents to queries [num_tokens, num_heads, head_dim]."""
        found: Tensor = self._q_b.matmul(latent).reshape([-1, self._heads, self._width])
        return found

    def index_queries(self, latent: Tensor | Normed) -> Tensor:
        """Project latents to the queries of the indexer, not rotated.

        Returns:
            [num_tokens, index_n_heads, index_head_dim].
        """
        found: Tensor = self._index_b.matmul(latent)
        return found.reshape([latent.shape[0], self._index_heads, -1])
