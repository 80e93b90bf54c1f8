"""DeepSeek-V3.2: the decoder that reads one step's metadata in all its layers."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from paddle import nn

from fd_dsa.attention.layers import RMSNorm, WeightLoader, loads, zeros_parameter
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.mla import DeepseekV32DSAAttention
from fd_dsa.models.moe import DeepseekMLP, DeepseekMoE
from fd_dsa.models.rope import RotaryEmbedding
from fd_dsa.ops._gemm import matrix
from fd_dsa.ops._host import readable
from fd_dsa.ops._linear import added, linear, rows_at
from fd_dsa.ops._norm import rms_norm


class DeepseekV32DecoderLayer(nn.Layer):
    """Norm, attention, norm, MLP, with residuals."""

    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DeepseekV32DSAAttention(config, layer_id)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.mlp_layer_types[layer_id] == "sparse":
            self.mlp: nn.Layer = DeepseekMoE(config)
        else:
            self.mlp = DeepseekMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_states: Any, cos_sin: Any, forward_meta: Any, shared_indices: Any
    ) -> tuple[Any, Any]:
        """Next hidden states, float32 [num_tokens, hidden_size], and the layer's selection."""
        input_norm, attention, norm, mlp = self._bound
        attended, indices = attention.forward(
            rms_norm(hidden_states, *input_norm), cos_sin, forward_meta, shared_indices
        )
        hidden_states = hidden_states + attended
        return added(hidden_states, mlp.forward(rms_norm(hidden_states, *norm))), indices

    @cached_property
    def _bound(self) -> tuple[Any, ...]:
        """Norms and parts, looked up once: a look-up in a Layer of Paddle is a call."""
        norms = self.input_layernorm.bound, self.post_attention_layernorm.bound
        return norms[0], self.self_attn, norms[1], self.mlp

    def weight_loaders(self, prefix: str) -> dict[str, WeightLoader]:
        """Checkpoint names below `prefix` and how each fills its parameter."""
        loaders = {
            f"{prefix}input_layernorm.weight": loads(self.input_layernorm.weight),
            f"{prefix}post_attention_layernorm.weight": loads(self.post_attention_layernorm.weight),
        }
        loaders |= self.self_attn.weight_loaders(f"{prefix}self_attn.")
        return loaders | self.mlp.weight_loaders(f"{prefix}mlp.")


class DeepseekV32ForCausalLM(nn.Layer):
    """The whole model: packed token ids of a step in, logits of chosen tokens out.

    Args:
        config: sizes, read from the model folder.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = zeros_parameter(self, [config.vocab_size, config.hidden_size])
        self.layers = nn.LayerList(
            [DeepseekV32DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = zeros_parameter(self, [config.hidden_size, config.vocab_size])
        self.rotary_emb = RotaryEmbedding(
            config.rope, config.qk_rope_head_dim, config.max_position_embeddings
        )
        self.eval()

    @cached_property
    def _bound(self) -> tuple[Any, ...]:
        """Embedding, layers, norm and head as a step reads them."""
        head = self.lm_head
        head = matrix(self.embed_tokens, transposed=True) if head is None else matrix(head)
        return readable(self.embed_tokens), list(self.layers), self.norm.bound, head

    def to_device(self, device: str) -> None:
        """Move all weights and tables to the memory of a device; before the first step."""
        self.to(device=device)
        self.rotary_emb.to_device(device)

    def forward(self, ids_remove_padding: Any, forward_meta: Any) -> Any:
        """Hidden states after the last block, float32 [num_tokens, hidden_size].

        Args:
            ids_remove_padding: int64, on a device also int32, [num_tokens]; token ids of the step,
                rows back to back.
            forward_meta: the runner's object; `init_attention_metadata` has been called for it.
                Its `selections`, where there are any, are given every layer's choice.
        """
        weight, layers, _, _ = self._bound
        hidden_states = rows_at(weight, ids_remove_padding)
        cos_sin = self.rotary_emb(forward_meta.position_ids)
        indices, selections = None, forward_meta.selections
        for layer in layers:
            hidden_states, indices = layer.forward(hidden_states, cos_sin, forward_meta, indices)
            if selections is not None:
                selections.add(indices)
        return hidden_states

    def compute_logits(self, hidden_states: Any) -> Any:
        """float32 [n, vocab_size] of float32 [n, hidden_size]."""
        _, _, norm, head = self._bound
        return linear(rms_norm(hidden_states, *norm), head, transpose_y=self.lm_head is None)

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """How each tensor of a Hugging Face checkpoint fills its parameter."""
        loaders = {
            "model.embed_tokens.weight": loads(self.embed_tokens),
            "model.norm.weight": loads(self.norm.weight),
        }
        if self.lm_head is not None:
            loaders["lm_head.weight"] = loads(self.lm_head, transpose=True)
        for i, layer in enumerate(self.layers):
            loaders |= layer.weight_loaders(f"model.layers.{i}.")
        return loaders
