"""Model of DeepSeek-V4 on a device, with the weights of `model.py` and kernels for its streams."""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.distributed.equal_parts import EqualParts
from fd_dsa.models.decoder import Decoder
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.device_attention import DeviceV4Attention
from fd_dsa.models.deepseek_v4.device_moe import DeviceV4MoE
from fd_dsa.models.deepseek_v4.tensors import (
    FINAL_NORM,
    HEAD_HC,
    MTP,
    MTP_HC,
    MTP_NORM,
    MTP_STREAMS,
    MTP_TOKENS,
)
from fd_dsa.models.deepseek_v32 import Head
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.sources import EMBEDDING
from fd_dsa.ops.arrays import rows_at
from fd_dsa.ops.dense_kernels import quantize_rows
from fd_dsa.ops.stream_kernels import (
    Connection,
    between_blocks,
    expand_streams,
    read_streams,
)
from fd_dsa.tensor import Normed, Tensor


def _connection(
    config: DeepseekV4Config, weights: DeviceWeights, prefix: str, norm: str, *, is_head: bool
) -> Connection:
    """Return the weights of a connection and of the norm after it.

    Args:
        prefix: start of the names of the connection.
        is_head: True for the connection before the head, which has fewer mixes.
    """
    streams, width = config.hc_mult, config.hidden_size
    mixes = streams if is_head else (2 + streams) * streams
    return Connection(
        weights.vector({f"{prefix}fn": mixes * streams * width}),
        weights.vector({f"{prefix}base": mixes}),
        weights.vector({f"{prefix}scale": 1 if is_head else 3}),
        weights.vector({norm: width}),
        config.rms_norm_eps,
        config.hc_eps,
        0 if is_head else config.hc_sinkhorn_iters,
        # a head is not FP8
        None if is_head else weights.scales_after(norm),
    )


class Residual(NamedTuple):
    """Streams between two blocks, to which the output of the last block is not added yet.

    In a long step a rank has the streams of its own tokens only.

    Attributes:
        streams: [num_tokens, num_streams, hidden_size]; None before the first block, when every
            stream is `change`.
        change: [num_tokens, hidden_size], output of the block.
        mixture: factors of both; None = the change is added to every stream.
    """

    streams: Tensor | None
    change: Tensor
    mixture: Tensor | None = None

    def flat(self, num_streams: int, parts: EqualParts) -> Tensor:
        """Return the streams of all tokens, [num_tokens, num_streams * hidden_size]."""
        streams, _ = expand_streams(self.streams, self.change, self.mixture, None, num_streams)
        return parts.gathered(streams.reshape([streams.shape[0], -1]))


class DeviceV4Layer:
    """Decoder layer: attention, then experts, each inside a connection.

    Attention and experts of a rank return its part of a sum over all ranks.

    Attributes:
        kind: kind of attention and experts.
    """

    def __init__(
        self, config: DeepseekV4Config, layer_id: int, weights: DeviceWeights, prefix: str
    ) -> None:
        self.kind = config.layer_types[layer_id], config.mlp_layer_types[layer_id]
        self._num_streams = config.hc_mult
        parts = [(f"{prefix}hc_{name}_", f"{prefix}{name}_norm.weight") for name in ("attn", "ffn")]
        self._connections = [_connection(config, weights, *part, is_head=False) for part in parts]
        self.attn = DeviceV4Attention(config, layer_id, weights, f"{prefix}attn.")
        self.ffn = DeviceV4MoE(config, layer_id, weights, f"{prefix}ffn.")

    def forward(
        self, residual: Residual, token_ids: Tensor, forward_meta: LayerStep, parts: EqualParts
    ) -> Residual:
        """Run the layer.

        Args:
            residual: streams of this rank's tokens.
            token_ids: integers [num_tokens], which select experts by token id.
            forward_meta: step of the runner, with metadata.
            parts: division of the step's tokens.
        """
        before_attention, before_experts = self._connections
        count = self._num_streams
        streams, x, mixture = between_blocks(*residual, before_attention, count)
        output = self.attn.forward(_of_all_tokens(x, parts, before_attention), forward_meta)
        change = parts.summed(output)
        streams, x, mixture = between_blocks(streams, change, mixture, before_experts, count)
        x = _of_all_tokens(x, parts, before_experts)
        output = self.ffn.forward(x, token_ids, forward_meta.slot_mapping)
        return Residual(streams, parts.summed(output), mixture)


def _of_all_tokens(
    x: Tensor | Normed, parts: EqualParts, connection: Connection
) -> Tensor | Normed:
    """Return the input of a block for all tokens, of an input for this rank's tokens."""
    plain = x.plain if isinstance(x, Normed) else x
    whole, rounds = parts.gathered(plain), connection.round_scales
    if whole is plain:
        return x
    # to the bits that the ranks have: scales are stored by group, so those of a part have gaps
    return whole if rounds is None else Normed(whole, quantize_rows(whole, rounds))


class DeviceMultiTokenPredictor:
    """MTP layer on a device, see `MultiTokenPredictor` of `model.py`.

    Attributes:
        embed_tokens: [vocab_size, hidden_size]; embedding of the next tokens.
        num_streams: residual streams of a token.
    """

    def __init__(self, model: DeviceV4ForCausalLM, weights: DeviceWeights) -> None:
        config = model.config
        hidden, eps, number = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
        self.embed_tokens, self.num_streams, self._model = model.embed_tokens, config.hc_mult, model
        self._token_norm = weights.norm(f"{MTP}enorm.weight", hidden, eps)
        self._stream_norm = weights.norm(f"{MTP}hnorm.weight", hidden, eps)
        self._token_in = weights.matrix(hidden, {MTP_TOKENS: hidden})
        self._stream_in = weights.matrix(hidden, {MTP_STREAMS: hidden})
        self.layer = DeviceV4Layer(config, number, weights, MTP)
        self._collapse = _connection(config, weights, MTP_HC, MTP_NORM, is_head=True)

    def __call__(self, next_ids: Tensor, hidden: Tensor, step: LayerStep) -> Tensor:
        """Return streams after the layer, [num_tokens, num_streams * hidden_size].

        Args:
            next_ids: integers [num_tokens], the token after each one of the step.
            hidden: streams of the step's tokens, same shape. They are the model's, or for a further
                draft those of this layer.
            step: step of the runner, with metadata.
        """
        count, parts = self.num_streams, EqualParts(self._model.group, hidden.shape[0])
        ids, hidden = parts.take(next_ids), parts.take(hidden)
        num_tokens = hidden.shape[0]
        embedded = self._token_norm.normalize(rows_at(self.embed_tokens, ids))
        rows = self._stream_norm.normalize(hidden.reshape([num_tokens * count, -1]))
        streams = self._stream_in.matmul(rows).reshape([num_tokens, count, -1])
        residual = Residual(streams, self._token_in.matmul(embedded))
        return self.layer.forward(residual, next_ids, step, parts).flat(count, parts)

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """Return logits float32 [n, vocab_size] of results of a call."""
        return _logits(hidden_states, self._collapse, self._model, out)


def _logits(
    hidden_states: Tensor, collapse: Connection, model: DeviceV4ForCausalLM, out: Tensor | None
) -> Tensor:
    """Return logits [n, vocab_size] of streams [n, num_streams * hidden_size], by the head."""
    count = model.config.hc_mult
    streams = hidden_states.reshape([hidden_states.shape[0], count, -1])
    # not `between_blocks`: a start samples few tokens in a step, and would leave the form for many
    # tokens uncompiled
    same, sums = expand_streams(streams, None, None, collapse, count)
    return model.head.logits(read_streams(same, sums, collapse)[0], out)


class DeviceV4ForCausalLM(Decoder[DeviceV4Layer]):
    """Model from packed token ids of a step to logits of sampled tokens.

    Attributes:
        config: sizes of the model.
        embed_tokens: [vocab_size, hidden_size].
        head: weight from normed sums of streams to logits.
        group: ranks that share the model; None = one rank.
        mtp: MTP layer, None = not loaded.
    """

    def __init__(self, config: DeepseekV4Config, weights: DeviceWeights) -> None:
        self.config, self.group = config, weights.group
        sizes = config.vocab_size, config.hidden_size
        self.embed_tokens, as_head = weights.table(EMBEDDING, *sizes)
        self.layers = [
            DeviceV4Layer(config, i, weights, f"model.layers.{i}.")
            for i in range(config.num_hidden_layers)
        ]
        self._collapse = _connection(config, weights, HEAD_HC, FINAL_NORM, is_head=True)
        self.head = Head(config, weights, embedding=as_head)
        self.mtp = None if config.mtp is None else DeviceMultiTokenPredictor(self, weights)

    def __call__(self, token_ids: Tensor, forward_meta: LayerStep) -> Tensor:
        """Return streams after the last layer, [num_tokens, num_streams * hidden_size].

        Args:
            token_ids: integers [num_tokens], token ids of the step, rows back to back.
            forward_meta: step of the runner, with metadata.
        """
        parts = EqualParts(self.group, token_ids.shape[0])
        residual = Residual(None, rows_at(self.embed_tokens, parts.take(token_ids)))
        for layer in self.layers:
            residual = layer.forward(residual, token_ids, forward_meta, parts)
        return residual.flat(self.config.hc_mult, parts)

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """Return logits float32 [n, vocab_size] of streams [n, num_streams * hidden_size]."""
        return _logits(hidden_states, self._collapse, self, out)
