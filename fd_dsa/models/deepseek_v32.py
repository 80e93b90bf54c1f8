"""Model of DeepSeek-V3.2 and GLM-5."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.decoder import Decoder
from fd_dsa.models.family_fields import FamilyFields
from fd_dsa.models.mla import DeepseekV32DSAAttention
from fd_dsa.models.moe import DeepseekMLP, DeepseekMoE
from fd_dsa.models.rope import cos_sin_table
from fd_dsa.models.sources import EMBEDDING, LM_HEAD, MTP_EMBEDDING, MTP_HEAD, MTP_JOIN
from fd_dsa.models.weights_protocol import Weights
from fd_dsa.ops.arrays import as_numpy, rows_at, values_of
from fd_dsa.ops.linear import Linear
from fd_dsa.tensor import Array, StepArray


class Head:
    """Weight from normed hidden states to logits, of which a rank may have a part of the rows.

    Args:
        name: name of the weight. There is no LM_HEAD if the embedding is the weight.
        embedding: the embedding as the weight of a head.
    """

    def __init__(
        self,
        config: FamilyFields,
        weights: Weights,
        name: str = LM_HEAD,
        embedding: Linear | None = None,
    ) -> None:
        self._weight: Any = embedding
        if name != LM_HEAD or not config.tie_word_embeddings:
            rows = {name: config.head_rows}
            self._weight = weights.matrix(config.hidden_size, rows, sums_in_float32=True)
        self._group = weights.group if config.head_rows < config.vocab_size else None

    def logits(self, hidden_states: StepArray, out: StepArray | None = None) -> StepArray:
        """Return logits float32 [n, vocab_size] of hidden states, from all ranks that divide them.

        Args:
            out: memory of the logits on a device; None allocates.
        """
        if self._group is None:
            return self._weight.matmul(hidden_states, out)
        logits = self._weight.matmul(hidden_states)
        gathered = self._group.all_gather(logits)
        if out is not None:
            # imported only for a device, because it loads kernels
            from fd_dsa.ops.head_gemm import join_columns

            return join_columns(gathered, out)
        return gathered.transpose([1, 0, 2]).reshape([-1, self._group.size * logits.shape[1]])


class DeepseekV32DecoderLayer:
    """Decoder layer: norm, attention, norm, MLP, with residuals.

    Attention and MLP of a rank return its part of a sum over all ranks. The next norm sums them.

    Attributes:
        kind: kind of MLP and attention.
    """

    def __init__(self, config: ModelConfig, layer_id: int, weights: Weights) -> None:
        self._group = weights.group
        prefix, hidden, eps = f"model.layers.{layer_id}.", config.hidden_size, config.rms_norm_eps
        self.input_layernorm = weights.norm(f"{prefix}input_layernorm.weight", hidden, eps)
        self.self_attn = DeepseekV32DSAAttention(config, layer_id, weights, f"{prefix}self_attn.")
        name = "post_attention_layernorm"
        self.post_attention_layernorm = weights.norm(f"{prefix}{name}.weight", hidden, eps)
        if config.mlp_layer_types[layer_id] == "sparse":
            self.mlp: Any = DeepseekMoE(config, weights, f"{prefix}mlp.")
        else:
            self.mlp = DeepseekMLP(weights, f"{prefix}mlp.", hidden, config.intermediate_size)
        self.kind = config.mlp_layer_types[layer_id], self.self_attn.indexer is None

    def forward(
        self,
        hidden_states: Array,
        change: Array | None,
        cos_sin: Array,
        forward_meta: LayerStep,
        shared_indices: Array | None,
    ) -> tuple[Array, Array, Array | None]:
        """Run the layer.

        Args:
            hidden_states: [num_tokens, hidden_size].
            change: this rank's part of the MLP output of the layer before, None in the first one.
            cos_sin, forward_meta, shared_indices: see `DeepseekV32DSAAttention.forward`.

        Returns:
            Hidden states, this rank's part of the MLP output, and the layer's selection.
        """
        if change is None:
            normed = self.input_layernorm.normalize(hidden_states)
        else:
            hidden_states, normed = self.input_layernorm.add_and_normalize(
                hidden_states, change, self._group
            )
        attended, indices = self.self_attn.forward(normed, cos_sin, forward_meta, shared_indices)
        norm = self.post_attention_layernorm
        hidden_states, normed = norm.add_and_normalize(hidden_states, attended, self._group)
        return hidden_states, self.mlp.forward(normed, forward_meta), indices


class MultiTokenPredictor:
    """MTP layer: predicts one more token from hidden states and next tokens.

        x_i = eh_proj(concat(enorm(embed(t_{i+1})), hnorm(h_i)))
        logits of t_{i+2} = head(norm(layer(x_i)))

    with position, slot and keys of token i, and a zero embedding at position 0, as in vLLM. A layer
    without embedding or head uses the model's.

    Attributes:
        embed_tokens: [vocab_size, hidden_size]; embedding of the next tokens.
        num_streams: 1, see MtpLayer.

    Source: DeepSeek-V3 (arXiv 2412.19437) section 2.2; names of Hugging Face checkpoints.
    """

    num_streams = 1

    def __init__(self, model: DeepseekV32ForCausalLM, weights: Weights) -> None:
        config, own = model.config, model.config.mtp or ()
        hidden, eps, number = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
        prefix, self._group = f"model.layers.{number}.", weights.group
        self._cos_sin, self._head = model.cos_sin, model.head
        self.embed_tokens = model.embed_tokens
        if MTP_EMBEDDING in own:
            self.embed_tokens, _ = weights.table(prefix + MTP_EMBEDDING, config.vocab_size, hidden)
        if MTP_HEAD in own:
            self._head = Head(config, weights, prefix + MTP_HEAD)
        self._token_norm = weights.norm(f"{prefix}enorm.weight", hidden, eps)
        self._hidden_norm = weights.norm(f"{prefix}hnorm.weight", hidden, eps)
        self._join = weights.matrix(2 * hidden, {prefix + MTP_JOIN: hidden})
        self.layer = DeepseekV32DecoderLayer(config, number, weights)
        self._norm = weights.norm(f"{prefix}shared_head.norm.weight", hidden, eps)

    def __call__(self, next_ids: StepArray, hidden: Array, step: LayerStep) -> Array:
        """Return hidden states after the layer's norm, [num_tokens, hidden_size].

        Args:
            next_ids: int64, on a device int32, [num_tokens], the token after each one of the step.
            hidden: [num_tokens, hidden_size], normed hidden states of the step's tokens. They are
                the model's, or for a further draft those of this layer.
            step: step of the runner, with metadata.
        """
        positions, norms = step.position_ids, (self._token_norm, self._hidden_norm)
        pair: Array
        if isinstance(hidden, np.ndarray):
            embedded = rows_at(self.embed_tokens, next_ids)
            embedded[as_numpy(positions) == 0] = 0
            pair = np.concatenate(
                [norms[0].normalize(embedded), norms[1].normalize(hidden)], axis=1
            )
        else:
            from fd_dsa.ops.mtp_kernels import mtp_inputs

            pair = mtp_inputs(self.embed_tokens, next_ids, positions, hidden, *norms)
        cos_sin = rows_at(self._cos_sin, positions)
        states, change, _ = self.layer.forward(self._join.matmul(pair), None, cos_sin, step, None)
        return values_of(self._norm.add_and_normalize(states, change, self._group)[1])

    def compute_logits(self, hidden_states: Array, out: Array | None = None) -> Array:
        """Return logits float32 [n, vocab_size] of results of a call, in `out` or new memory."""
        return self._head.logits(hidden_states, out)


class DeepseekV32ForCausalLM(Decoder[DeepseekV32DecoderLayer]):
    """Model from packed token ids of a step to logits of sampled tokens.

    Attributes:
        embed_tokens: [vocab_size, hidden_size].
        cos_sin: float32 [max_position_embeddings, qk_rope_head_dim], all positions.
        head: weight from normed hidden states to logits.
        group: ranks that share the model; None = one rank.
        mtp: MTP layer, None = not loaded.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.group = config, weights.group
        vocab_size, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens, as_head = weights.table(EMBEDDING, vocab_size, hidden)
        self.layers = [
            DeepseekV32DecoderLayer(config, i, weights) for i in range(config.num_hidden_layers)
        ]
        self.norm = weights.norm("model.norm.weight", hidden, config.rms_norm_eps)
        self.head = Head(config, weights, embedding=as_head)
        width, positions = config.qk_rope_head_dim, config.max_position_embeddings
        self.cos_sin = weights.constant(partial(cos_sin_table, config.rope, width, positions))
        self.mtp = None if config.mtp is None else MultiTokenPredictor(self, weights)

    def __call__(self, token_ids: Array, forward_meta: LayerStep) -> Array:
        """Return hidden states after the last norm, [num_tokens, hidden_size].

        Args:
            token_ids: int64, on a device also int32, [num_tokens], rows back to back.
            forward_meta: step of the runner, with metadata. Its `selections`
                record the selection of every layer, None = no recording.
        """
        hidden_states = rows_at(self.embed_tokens, token_ids)
        cos_sin = rows_at(self.cos_sin, forward_meta.position_ids)
        change, indices, selections = None, None, forward_meta.selections
        for layer in self.layers:
            hidden_states, change, indices = layer.forward(
                hidden_states, change, cos_sin, forward_meta, indices
            )
            if selections is not None:
                selections.add(indices)
        return self.norm.add_and_normalize(hidden_states, change, self.group)[1]

    def compute_logits(self, hidden_states: Array, out: Array | None = None) -> Array:
        """Return logits float32 [n, vocab_size] of hidden states, in `out` or new memory."""
        return self.head.logits(hidden_states, out)
