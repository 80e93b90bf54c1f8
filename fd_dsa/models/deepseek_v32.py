"""DeepSeek-V3.2: the decoder that reads one step's metadata in all its layers."""

from __future__ import annotations

from typing import Any

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.mla import DeepseekV32DSAAttention
from fd_dsa.models.moe import DeepseekMLP, DeepseekMoE
from fd_dsa.models.rope import RotaryEmbedding
from fd_dsa.models.sources import WeightLoader
from fd_dsa.ops._linear import added, rows_at


class DeepseekV32DecoderLayer:
    """Norm, attention, norm, MLP, with residuals."""

    def __init__(self, config: ModelConfig, layer_id: int, weights: Any) -> None:
        prefix, hidden, eps = f"model.layers.{layer_id}.", config.hidden_size, config.rms_norm_eps
        self._input_norm = weights.norm(f"{prefix}input_layernorm.weight", hidden, eps)
        self.self_attn = DeepseekV32DSAAttention(config, layer_id, weights, f"{prefix}self_attn.")
        self._norm = weights.norm(f"{prefix}post_attention_layernorm.weight", hidden, eps)
        if config.mlp_layer_types[layer_id] == "sparse":
            self.mlp: Any = DeepseekMoE(config, weights, f"{prefix}mlp.")
        else:
            self.mlp = DeepseekMLP(weights, f"{prefix}mlp.", hidden, config.intermediate_size)

    def forward(
        self, hidden_states: Any, change: Any, cos_sin: Any, forward_meta: Any, shared_indices: Any
    ) -> tuple[Any, Any, Any]:
        """Hidden states, the change that the MLP makes to them, and the layer's selection.

        Args:
            hidden_states: [num_tokens, hidden_size].
            change: of the layer before, not yet added; None before the first one.
            cos_sin, forward_meta, shared_indices: as of the attention.
        """
        if change is None:
            normed = self._input_norm.of(hidden_states)
        else:
            hidden_states, normed = self._input_norm.after(hidden_states, change)
        attended, indices = self.self_attn.forward(normed, cos_sin, forward_meta, shared_indices)
        hidden_states, normed = self._norm.after(hidden_states, attended)
        return hidden_states, self.mlp.forward(normed, forward_meta), indices


class DeepseekV32ForCausalLM:
    """The whole model: packed token ids of a step in, logits of chosen tokens out.

    Args:
        config: sizes, read from the model folder.
        weights: HostWeights or DeviceWeights, which make what the layers ask for.

    Attributes:
        embed_tokens: [vocab_size, hidden_size].
    """

    def __init__(self, config: ModelConfig, weights: Any) -> None:
        self.config, self._weights = config, weights
        vocab_size, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens, self._head = weights.table(
            "model.embed_tokens.weight", vocab_size, hidden
        )
        self.layers = [
            DeepseekV32DecoderLayer(config, i, weights) for i in range(config.num_hidden_layers)
        ]
        self.norm = weights.norm("model.norm.weight", hidden, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self._head = weights.matrix(
                hidden, {"lm_head.weight": vocab_size}, sums_in_float32=True
            )
        self.rotary_emb = RotaryEmbedding(
            config.rope, config.qk_rope_head_dim, config.max_position_embeddings, weights
        )

    @property
    def loaders(self) -> dict[str, WeightLoader]:
        """How each tensor of a Hugging Face checkpoint fills its place."""
        return self._weights.loaders  # type: ignore[no-any-return]

    def __call__(self, ids_remove_padding: Any, forward_meta: Any) -> Any:
        """Hidden states after the last block [num_tokens, hidden_size].

        Args:
            ids_remove_padding: int64, on a device also int32, [num_tokens]; token ids of the step,
                rows back to back.
            forward_meta: the runner's object; `init_attention_metadata` has been called for it.
                Its `selections`, where there are any, are given every layer's choice.
        """
        hidden_states = rows_at(self.embed_tokens, ids_remove_padding)
        cos_sin = self.rotary_emb(forward_meta.position_ids)
        change, indices, selections = None, None, forward_meta.selections
        for layer in self.layers:
            hidden_states, change, indices = layer.forward(
                hidden_states, change, cos_sin, forward_meta, indices
            )
            if selections is not None:
                selections.add(indices)
        return added(hidden_states, change)

    def compute_logits(self, hidden_states: Any) -> Any:
        """float32 [n, vocab_size] of [n, hidden_size]."""
        return self._head.times(self.norm.of(hidden_states))
