"""Configuration of a model, read from a folder in Hugging Face format."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fd_dsa.models.config_fields import (
    Fp8BlockQuant,
    GenerationDefaults,
    read_fields,
    read_generation,
)
from fd_dsa.models.config_reader import FieldReader, read_json_object
from fd_dsa.models.families import FAMILIES
from fd_dsa.models.rope_config import RopeConfig, yarn_mscale

__all__ = ["Fp8BlockQuant", "GenerationDefaults", "ModelConfig", "RopeConfig"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about a model that its layers, caches and weights depend on.

    The names are those of Hugging Face's config.json (transformers 5.23); widths are numbers of
    elements, `max_position_embeddings` and `index_topk` tokens.

    Attributes:
        mla_norm_eps: eps of the norms after q_a and kv_a, which Hugging Face fixes at 1e-6
            whatever `rms_norm_eps` says; our own key `mla_norm_eps` in config.json changes it.
        indexer_rope_interleave: pairing of the indexer's RoPE: interleaved, else half-split.
        attention_bias: q_a_proj, kv_a_proj_with_mqa and o_proj have a bias.
        mlp_bias: always False: a file that says true is refused, since Hugging Face has no such
            bias in these models.
        mlp_layer_types: "dense" or "sparse" (experts), one a layer.
        indexer_types: "full" (own indexer) or "shared" (uses the choice of the nearest "full"
            layer before it), one a layer.
        eos_token_ids: of config.json, then those that generation_config.json adds.
        quantization: None where the weights are plain.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    rms_norm_eps: float
    mla_norm_eps: float
    rope: RopeConfig
    indexer_rope_interleave: bool
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    mlp_layer_types: tuple[str, ...]
    indexer_types: tuple[str, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    quantization: Fp8BlockQuant | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ModelConfig:
        """Configuration of the model in a folder.

        Reads config.json and, where it exists, generation_config.json.

        Raises:
            ConfigError: a file is missing or damaged, or a value cannot be served; the message
                names the file and the field.
        """
        path = Path(folder) / "config.json"
        generation_path = Path(folder) / "generation_config.json"
        generation = read_json_object(generation_path) if generation_path.exists() else None
        return cls.from_dict(read_json_object(path), str(path), generation, str(generation_path))

    @classmethod
    def from_dict(
        cls,
        data: dict[str, Any],
        source: str = "config.json",
        generation: dict[str, Any] | None = None,
        generation_source: str = "generation_config.json",
    ) -> ModelConfig:
        """Configuration in parsed JSON; see `from_folder`.

        Unknown fields are logged in one warning, fields known to be harmless not at all.

        Raises:
            ConfigError: a value cannot be served.
        """
        reader = FieldReader(data, source)
        if "model_type" not in data:
            raise reader.error("model_type", None, " or ".join(FAMILIES), "is this a model's file?")
        family = FAMILIES[reader.choice("model_type", None, tuple(FAMILIES))]
        values = read_fields(reader, family)
        vocab_size = values["vocab_size"]
        defaults, more_eos = read_generation(
            FieldReader(generation or {}, generation_source), vocab_size
        )
        values["eos_token_ids"] = tuple(dict.fromkeys(values["eos_token_ids"] + more_eos))
        return cls(model_type=family.model_type, generation=defaults, **values)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: the part without RoPE, then the part with it."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Multiplier of the attention scores, YaRN's square included.

        Source: Hugging Face transformers 5.23, yarn_apply_mscale of models/deepseek_v32.
        """
        mscale = 1.0
        if self.rope.type == "yarn":
            mscale = yarn_mscale(self.rope.factor, self.rope.mscale_all_dim)
        return float(self.qk_head_dim**-0.5 * mscale * mscale)

    @property
    def num_indexer_layers(self) -> int:
        """Layers with an indexer of their own, that is with an indexer cache."""
        return self.indexer_types.count("full")
