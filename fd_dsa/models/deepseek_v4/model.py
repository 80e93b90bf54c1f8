"""Model of DeepSeek-V4, a decoder over several residual streams."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.distributed import summed
from fd_dsa.models.decoder import Decoder
from fd_dsa.models.deepseek_v4.attention import V4Attention
from fd_dsa.models.deepseek_v4.config import WINDOW, DeepseekV4Config
from fd_dsa.models.deepseek_v4.hyper import HeadCollapse, HyperConnection
from fd_dsa.models.deepseek_v4.moe import V4MoE
from fd_dsa.models.deepseek_v4.norm import RowNorm
from fd_dsa.models.deepseek_v4.rotation import Angles, Rotation
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
from fd_dsa.models.sources import EMBEDDING
from fd_dsa.models.weights_protocol import HostOnlyWeights
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.tensor import Array


class DeepseekV4DecoderLayer:
    """Decoder layer: attention, then experts, each inside a hyper-connection.

    Attention and experts of a rank return its part of a sum over all ranks.

    Attributes:
        kind: kind of attention and experts.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        layer_id: int,
        weights: HostOnlyWeights,
        prefix: str,
        rotation: Rotation,
    ) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._group = weights.group
        self.kind = config.layer_types[layer_id], config.mlp_layer_types[layer_id]
        self._attn_hc = HyperConnection(config, weights, f"{prefix}hc_attn_")
        self._ffn_hc = HyperConnection(config, weights, f"{prefix}hc_ffn_")
        self._attn_norm = RowNorm(weights, f"{prefix}attn_norm.weight", hidden, eps)
        self._ffn_norm = RowNorm(weights, f"{prefix}ffn_norm.weight", hidden, eps)
        self.attn = V4Attention(config, layer_id, weights, f"{prefix}attn.", rotation)
        self.ffn = V4MoE(config, layer_id, weights, f"{prefix}ffn.")

    def forward(
        self,
        residual: np.ndarray,
        token_ids: np.ndarray,
        angles: Angles,
        forward_meta: LayerStep,
        kept: np.ndarray | slice,
    ) -> np.ndarray:
        """Return the residual [num_kept, num_streams + 1, hidden_size] after the layer.

        The last row is scratch memory of the next block.

        Args:
            kept: index of the tokens whose streams are needed.
        """
        x, mixture = self._attn_hc.read(residual[:, :-1])
        part = self.attn.forward(self._attn_norm.normalize(x), angles, forward_meta, kept)
        attended = summed(part, self._group)
        residual = self._attn_hc.expand(attended, residual[kept], mixture[kept])
        x, mixture = self._ffn_hc.read(residual[:, :-1])
        part = self.ffn.forward(self._ffn_norm.normalize(x), token_ids[kept])
        return self._ffn_hc.expand(summed(part, self._group), residual, mixture)


class MultiTokenPredictor:
    """MTP layer: predicts one more token from residual streams and next tokens.

        x_i = h_proj(hnorm(s_i)) + e_proj(enorm(embed(t_{i+1}))).
        logits of t_{i+2} = head(norm(collapse(layer(x_i)))).

    The streams s_i are those before the model sums them, and each gets the same embedding. The
    layer returns streams, too, from which a further draft goes on. Positions and keys are those of
    token i. Embedding and head are the model's.

    Attributes:
        embed_tokens: [vocab_size, hidden_size]; embedding of the next tokens.
        num_streams: residual streams of a token.

    Source: MTPBlock of DeepSeek's inference code for V4.
    """

    def __init__(
        self, model: DeepseekV4ForCausalLM, weights: HostOnlyWeights, rotation: Rotation
    ) -> None:
        config, self._rotation = model.config, rotation
        hidden, eps, number = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
        self.embed_tokens, self._model = model.embed_tokens, model
        self.num_streams = config.hc_mult
        self._token_norm = RowNorm(weights, f"{MTP}enorm.weight", hidden, eps)
        self._stream_norm = RowNorm(weights, f"{MTP}hnorm.weight", hidden, eps)
        self._token_in = weights.matrix(hidden, {MTP_TOKENS: hidden})
        self._stream_in = weights.matrix(hidden, {MTP_STREAMS: hidden})
        self.layer = DeepseekV4DecoderLayer(config, number, weights, MTP, rotation)
        self._collapse = HeadCollapse(config, weights, MTP_HC)
        self._norm = RowNorm(weights, MTP_NORM, hidden, eps)

    def __call__(self, next_ids: Array, hidden: np.ndarray, step: LayerStep) -> np.ndarray:
        """Return streams after the layer, [num_tokens, num_streams * hidden_size].

        Args:
            next_ids: int64 [num_tokens], the token after each one of the step.
            hidden: streams of the step's tokens, same shape. They are the model's, or for a further
                draft those of this layer.
            step: step of the runner, with metadata.
        """
        ids = as_numpy(next_ids)
        embedded = self._token_in.matmul(self._token_norm.normalize(self.embed_tokens[ids]))
        rows, width = hidden.reshape(-1, embedded.shape[1]), embedded.shape[1]
        streams = self._stream_in.matmul(self._stream_norm.normalize(rows))
        streams = streams.reshape(len(ids), -1, width)
        residual = np.empty((len(ids), streams.shape[1] + 1, width), np.float32)
        np.add(streams, embedded[:, None], out=residual[:, :-1])
        angles = self._rotation.of_step(step.position_ids)
        with np.errstate(over="ignore"):
            residual = self.layer.forward(residual, ids, angles, step, slice(None))
        return np.ascontiguousarray(residual[:, :-1]).reshape(len(ids), -1)

    def compute_logits(
        self, hidden_states: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return logits [n, vocab_size] of results of a call."""
        return _logits(hidden_states, self._collapse, self._norm, self._model, out)


def _logits(
    hidden_states: np.ndarray,
    collapse: HeadCollapse,
    norm: RowNorm,
    model: DeepseekV4ForCausalLM,
    out: np.ndarray | None,
) -> np.ndarray:
    """Return logits [n, vocab_size] of streams [n, num_streams * hidden_size], by the head."""
    num_streams = collapse.num_streams
    # there may be no row
    streams = hidden_states.reshape(-1, num_streams, hidden_states.shape[1] // num_streams)
    with np.errstate(over="ignore"):
        collapsed = collapse.weighted_sum(streams)
    return as_numpy(model.head.logits(norm.normalize(collapsed), out))


class DeepseekV4ForCausalLM(Decoder[DeepseekV4DecoderLayer]):
    """Model from packed token ids of a step to logits of sampled tokens.

    Attributes:
        config: sizes of the model.
        embed_tokens: [vocab_size, hidden_size].
        head: weight from normed sums of streams to logits.
        group: ranks that share the model; None = one rank.
        mtp: MTP layer, None = not loaded.
    """

    def __init__(self, config: DeepseekV4Config, weights: HostOnlyWeights) -> None:
        self.config, self.group, hidden = config, weights.group, config.hidden_size
        self.embed_tokens, as_head = weights.table(EMBEDDING, config.vocab_size, hidden)
        width = config.qk_rope_head_dim
        # rotations of layers with entries, then of window-only layers
        self._rotations = [
            Rotation(rope, width) for rope in (config.compress_rope, config.main_rope)
        ]
        kinds = config.layer_types[: config.num_hidden_layers]
        self._is_window = [kind == WINDOW for kind in kinds]
        self.layers = [
            DeepseekV4DecoderLayer(
                config, i, weights, f"model.layers.{i}.", self._rotations[is_window]
            )
            for i, is_window in enumerate(self._is_window)
        ]
        self._collapse = HeadCollapse(config, weights, HEAD_HC)
        self._norm = RowNorm(weights, FINAL_NORM, hidden, config.rms_norm_eps)
        self.head = Head(config, weights, embedding=as_head)
        self.mtp = None
        if config.mtp is not None:
            self.mtp = MultiTokenPredictor(self, weights, self._rotations[True])

    def __call__(self, token_ids: Array, forward_meta: LayerStep) -> np.ndarray:
        """Return streams after the last layer, [num_tokens, num_streams * hidden_size].

        Without an MTP layer only tokens of `forward_meta.sampled` have values, because the last
        layer skips the others.

        Args:
            token_ids: int64 [num_tokens], token ids of the step, rows back to back.
            forward_meta: step of the runner, with metadata.
        """
        ids, positions = as_numpy(token_ids), forward_meta.position_ids
        rows = self.embed_tokens[ids]
        # for each token its streams, and a row for the output of a block
        residual = np.repeat(rows[:, None], self.config.hc_mult + 1, axis=1)
        angles = [rotation.of_step(positions) for rotation in self._rotations]
        # the last layer computes only sampled tokens, or a single token if the step samples none
        sampled, everything = as_numpy(forward_meta.sampled), slice(None)
        asked: Any = sampled if len(sampled) else slice(1)
        if self.mtp is not None or len(sampled) == len(rows):
            asked = everything
        # exp(-x) of sigmoids may overflow to inf: 1 / inf is the right 0
        with np.errstate(over="ignore"):
            for layer, is_window in zip(self.layers, self._is_window, strict=True):
                kept = asked if layer is self.layers[-1] else everything
                step = ids, angles[is_window], forward_meta
                residual = layer.forward(residual, *step, kept)
        streams = np.empty((len(rows), self.config.hc_mult, rows.shape[1]), np.float32)
        streams[kept] = residual[:, :-1]
        return streams.reshape(len(rows), -1)

    def compute_logits(
        self, hidden_states: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return logits [n, vocab_size] of streams [n, num_streams * hidden_size]."""
        return _logits(hidden_states, self._collapse, self._norm, self, out)
