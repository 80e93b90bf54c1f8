"""Model of DeepSeek-V4 on a device, with the weights of `model.py` and kernels for its streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.distributed import summed
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.device_attention import DeviceV4Attention
from fd_dsa.models.deepseek_v4.device_moe import DeviceV4MoE
from fd_dsa.models.deepseek_v4.tensors import FINAL_NORM, HEAD_HC
from fd_dsa.models.deepseek_v32 import logits_of
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.sources import EMBEDDING, LM_HEAD, WeightLoader
from fd_dsa.ops.arrays import rows_at
from fd_dsa.ops.stream_kernels import Connection, expand_streams, read_streams
from fd_dsa.tensor import Tensor


def _connection(
    config: DeepseekV4Config, weights: DeviceWeights, prefix: str, norm: str
) -> Connection:
    """Return the weights of a connection and of the norm after it.

    Args:
        prefix: start of the names of the connection. That of the head has fewer mixes.
    """
    streams, width = config.hc_mult, config.hidden_size
    is_head = prefix == HEAD_HC
    mixes = streams if is_head else (2 + streams) * streams
    return Connection(
        weights.vector({f"{prefix}fn": mixes * streams * width}),
        weights.vector({f"{prefix}base": mixes}),
        weights.vector({f"{prefix}scale": 1 if is_head else 3}),
        weights.vector({norm: width}),
        config.rms_norm_eps,
        config.hc_eps,
        0 if is_head else config.hc_sinkhorn_iters,
    )


class DeviceV4Layer:
    """Decoder layer: attention, then experts, each inside a connection.

    Attention and experts of a rank return its part of a sum over all ranks.
    """

    def __init__(self, config: DeepseekV4Config, layer_id: int, weights: DeviceWeights) -> None:
        prefix = f"model.layers.{layer_id}."
        self.kinds = config.layer_types[layer_id], config.mlp_layer_types[layer_id]
        parts = [(f"{prefix}hc_{name}_", f"{prefix}{name}_norm.weight") for name in ("attn", "ffn")]
        self.connections = [_connection(config, weights, *part) for part in parts]
        self.attn = DeviceV4Attention(config, layer_id, weights, f"{prefix}attn.")
        self.ffn = DeviceV4MoE(config, layer_id, weights, f"{prefix}ffn.")


class DeviceV4ForCausalLM:
    """Model from packed token ids of a step to logits of sampled tokens.

    Attributes:
        config: sizes of the model.
        group: ranks that share the model; None = one rank.
        mtp: None, because draft layers are not loaded.
    """

    mtp: None = None

    def __init__(self, config: DeepseekV4Config, weights: DeviceWeights) -> None:
        self.config, self._weights, self.group = config, weights, weights.group
        vocab_size, hidden = config.vocab_size, config.hidden_size
        self._embedding, self._head = weights.table(EMBEDDING, vocab_size, hidden)
        self.layers = [DeviceV4Layer(config, i, weights) for i in range(config.num_hidden_layers)]
        self._collapse = _connection(config, weights, HEAD_HC, FINAL_NORM)
        if not config.tie_word_embeddings:
            self._head = weights.matrix(hidden, {LM_HEAD: config.head_rows}, sums_in_float32=True)
        self._head_group = weights.group if config.head_rows < vocab_size else None

    @property
    def loaders(self) -> dict[str, WeightLoader]:
        """Loader of each checkpoint tensor, by name."""
        return self._weights.loaders

    def __call__(self, token_ids: Tensor, forward_meta: LayerStep) -> Tensor:
        """Return streams after the last layer, [num_tokens, num_streams * hidden_size].

        Args:
            token_ids: integers [num_tokens], token ids of the step, rows back to back.
            forward_meta: step of the runner, with metadata.
        """
        padding, count = forward_meta.slot_mapping, self.config.hc_mult
        change: Tensor = rows_at(self._embedding, token_ids)
        streams, mixture = None, None
        for layer in self.layers:
            before_attention, before_experts = layer.connections
            streams, sums = expand_streams(streams, change, mixture, before_attention, count)
            x, mixture = read_streams(streams, sums, before_attention)
            change = summed(layer.attn.forward(x, forward_meta), self.group)
            streams, sums = expand_streams(streams, change, mixture, before_experts, count)
            x, mixture = read_streams(streams, sums, before_experts)
            change = summed(layer.ffn.forward(x, token_ids, padding), self.group)
        streams, _ = expand_streams(streams, change, mixture, None, count)
        return streams.reshape([streams.shape[0], -1])

    @contextmanager
    def one_layer_of_each_kind(self) -> Iterator[None]:
        """Run steps through the first layer of each kind of attention and experts inside."""
        layers = self.layers
        first = {layer.kinds: layer for layer in reversed(layers)}
        self.layers = [layer for layer in layers if layer in first.values()]
        try:
            yield
        finally:
            self.layers = layers

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """Return logits float32 [n, vocab_size] of streams [n, num_streams * hidden_size]."""
        streams = hidden_states.reshape([hidden_states.shape[0], self.config.hc_mult, -1])
        same, sums = expand_streams(streams, None, None, self._collapse, self.config.hc_mult)
        read = read_streams(same, sums, self._collapse)[0]
        return logits_of(self._head, read, self._head_group, out)
