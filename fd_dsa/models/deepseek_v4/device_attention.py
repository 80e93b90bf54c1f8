"""Attention of DeepSeek-V4 on a device: the weights and projections of a layer."""

from __future__ import annotations

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.models.deepseek_v4.config import CSA, WINDOW, DeepseekV4Config
from fd_dsa.models.weights_protocol import Weights
from fd_dsa.ops.dense_kernels import GROUP
from fd_dsa.ops.device_matrix import GroupedFp8
from fd_dsa.tensor import Normed, Tensor


class DeviceCompressor:
    """Weights of one compressor apart from its projections.

    Attributes:
        gates: float32 [ratio * halves * width], added to the gates of a token's source.
        norm: float32 [width].

    Args:
        width: channels of an entry.
    """

    def __init__(
        self, config: DeepseekV4Config, kind: str, width: int, weights: Weights, prefix: str
    ) -> None:
        self._prefix, self._width = prefix, width
        pool = config.pooled_tokens(kind)
        self._halves = pool // config.compress_rates[kind]
        self.gates: Tensor = weights.vector({f"{prefix}ape": pool * self._width})
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
        q_norm: RMSNorm of the latents of the queries.
        kv_norm: float32 [head_dim], weight of the keys' RMSNorm.
        round_scales: form of the attended values. None = the type of activations, else FP8 whose
            scales are powers of two or not.
        compressor, index_compressor: None in a window-only layer, the second also in an HCA layer.
    """

    def __init__(
        self, config: DeepseekV4Config, layer_id: int, weights: Weights, prefix: str
    ) -> None:
        self.layer_id, kind = layer_id, config.layer_types[layer_id]
        self._heads, self._width = config.num_attention_heads, config.head_dim
        hidden, rank, self._groups = config.hidden_size, config.q_lora_rank, config.o_groups
        down = {f"{prefix}wq_a.weight": rank, f"{prefix}wkv.weight": self._width}
        self._down = weights.matrix(hidden, down)
        self.q_norm = weights.norm(f"{prefix}q_norm.weight", rank, config.rms_norm_eps)
        self.kv_norm: Tensor = weights.vector({f"{prefix}kv_norm.weight": self._width})
        self.sinks: Tensor = weights.vector({f"{prefix}attn_sink": self._heads})
        self.compressor: DeviceCompressor | None = None
        self.index_compressor: DeviceCompressor | None = None
        self._query_columns = self._heads * self._width
        queries = {f"{prefix}wq_b.weight": self._query_columns}
        # projections in bfloat16: sources of the compressors, then weights of the indexer's heads
        beside: dict[str, int] = {}
        if kind != WINDOW:
            name = f"{prefix}compressor."
            self.compressor = DeviceCompressor(config, kind, config.head_dim, weights, name)
            beside |= self.compressor.parts
            if kind == CSA:
                name = f"{prefix}indexer.compressor."
                width = config.index_head_dim
                self.index_compressor = DeviceCompressor(config, kind, width, weights, name)
                beside |= self.index_compressor.parts
        self._source = sum(beside.values())
        if kind == CSA:
            heads = config.index_n_heads
            queries[f"{prefix}indexer.wq_b.weight"] = heads * config.index_head_dim
            # a factor of all scores changes no selection
            beside[f"{prefix}indexer.weights_proj.weight"] = heads
        self._beside = weights.matrix(hidden, beside, sums_in_float32=True) if beside else None
        self._q_b = weights.matrix(rank, queries)
        self._own_q_b = self._q_b.first_rows(self._query_columns)
        group, low = self._heads * self._width // self._groups, config.o_lora_rank
        self._out_a = weights.grouped(f"{prefix}wo_a.weight", self._groups, group, low)
        is_fp8 = isinstance(self._out_a, GroupedFp8) and self._width % GROUP == 0
        self.round_scales: bool | None = self._out_a.round_scales if is_fp8 else None
        self._out_b = weights.matrix(self._groups * low, {f"{prefix}wo_b.weight": hidden})

    def forward(self, x: Tensor | Normed, forward_meta: LayerStep) -> Tensor:
        """Return the attention output [num_tokens, hidden_size] of normed inputs."""
        attended, _ = forward_meta.attn_backend.forward(self, x, None, forward_meta)
        if self.round_scales is None:
            attended = attended.reshape([attended.shape[0], self._groups, -1])
        low = self._out_a.matmul_join_heads(attended, self._out_b)
        out: Tensor = self._out_b.matmul(low)
        return out

    def project(self, x: Tensor | Normed) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Multiply the layer's input by all weights that read it.

        Returns:
            Latents of the queries, then keys, [num_tokens, q_lora_rank + head_dim], neither normed
            nor rotated. Sources of the compressors, float32 [num_tokens, values of a source], None
            without a compressor. Weights of the indexer's heads, float32 [num_tokens,
            index_n_heads], None without an indexer. The last two are columns of wider rows.
        """
        if self._beside is None:
            both: Tensor = self._down.matmul(x)
            return both, None, None
        both, sources = self._down.matmul_beside(x, self._beside)
        if self.index_compressor is None:
            return both, sources, None
        return both, sources[:, : self._source], sources[:, self._source :]

    def queries(self, latent: Tensor | Normed) -> Tensor:
        """Project latents to queries [num_tokens, num_heads * head_dim]."""
        found: Tensor = self._own_q_b.matmul(latent)
        return found

    def queries_and_index(self, latent: Tensor | Normed) -> tuple[Tensor, Tensor]:
        """Project latents to queries, and to those of the indexer.

        Returns:
            [num_tokens, num_heads * head_dim] and [num_tokens, index_n_heads * index_head_dim],
            columns of wider rows.
        """
        both = self._q_b.matmul(latent)
        return both[:, : self._query_columns], both[:, self._query_columns :]
