"""Configuration of models with the layers of DeepSeek-V3.2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fd_dsa.cache_formats import FP8_BLOCK_SIZE, CacheLayout
from fd_dsa.models.config_reader import FieldReader
from fd_dsa.models.defaults import ModelDefaults
from fd_dsa.models.family_fields import (
    FamilyFields,
    check_num_experts,
    read_numbers,
    read_tokens,
    spare_layers,
)
from fd_dsa.models.quantization import read_quantization
from fd_dsa.models.rope_config import RopeConfig, read_rope, yarn_mscale

__all__ = ["ModelConfig", "RopeConfig"]

# defaults that are no field of config.json, or have a reading function of their own
_READ_APART = (
    "n_routed_experts",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "rope_theta",
    "shares_selections",
)
# fields with one supported value: any other would change the result
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "mlp_bias": False,
    "rope_interleave": True,
}
# DSA's name in transformers, and the one that 5.17 wrote
_LAYER_TYPES = ("indexed_attention", "deepseek_sparse_attention")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelDefaults, FamilyFields):
    """Everything about a model that its layers, caches and weights depend on.

    Widths are numbers of elements, `max_position_embeddings` and `index_topk` are numbers of
    tokens.

    Attributes:
        attention_bias: q_a_proj, kv_a_proj_with_mqa and o_proj have a bias.
        mlp_layer_types: "dense" or "sparse" (experts), one per layer.
        indexer_types: "full" (own indexer) or "shared" (uses the selection of the nearest "full"
            layer before it), one per layer.
    """

    split_names = "num_attention_heads", "intermediate_size", "moe_intermediate_size"

    rope: RopeConfig
    attention_bias: bool
    indexer_types: tuple[str, ...]

    @classmethod
    def read(cls, reader: FieldReader, defaults: ModelDefaults) -> ModelConfig:
        """Return the configuration in a config.json.

        Args:
            reader: top level of the file.
            defaults: values of the fields that the file leaves out.

        Raises:
            ConfigError: a value is not supported. The message names the file and the field.
        """
        return cls(**_read_fields(reader, defaults))

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

    def with_mtp_layer(self, *tables: str) -> ModelConfig:
        """Return the configuration with the MTP layer, which has `tables` of its own."""
        return replace(
            self,
            mtp=tables,
            mlp_layer_types=(*self.mlp_layer_types, self.mlp_layer_types[-1]),
            indexer_types=(*self.indexer_types, "full"),
        )

    @property
    def has_indexer(self) -> list[bool]:
        """True for each layer with an indexer, which has an indexer cache, too."""
        return [kind == "full" for kind in self.indexer_types]

    @property
    def num_indexer_layers(self) -> int:
        """Number of layers with an indexer."""
        return sum(self.has_indexer)

    @property
    def max_dense_keys(self) -> int:
        """Max tokens of a row whose last token attends to all of them."""
        return self.index_topk

    @property
    def default_block_size(self) -> int:
        """Tokens of a cache block, which every cache format allows."""
        return FP8_BLOCK_SIZE

    def cache_layout(self, kv_cache_dtype: str, block_size: int) -> CacheLayout:
        """Return the layout of the caches.

        Args:
            kv_cache_dtype: name of a `CacheFormat`.
            block_size: tokens of a block.

        Raises:
            ConfigError: the format does not allow the model's widths or the block size.
        """
        return CacheLayout(
            kv_cache_dtype,
            block_size,
            self.kv_lora_rank,
            self.qk_rope_head_dim,
            self.index_head_dim,
        )


def _read_fields(reader: FieldReader, defaults: ModelDefaults) -> dict[str, Any]:
    """Read all fields of config.json, with defaults of those that it leaves out."""
    values = read_numbers(reader, defaults, _READ_APART)
    values["n_routed_experts"] = _read_num_experts(reader, defaults)
    values |= _read_groups(reader, defaults)
    for name, value in _FIXED.items():
        reader.choice(name, value, (value,))
    rope = read_rope(reader, defaults.rope_theta, values["max_position_embeddings"])
    num_layers, vocab_size = values["num_hidden_layers"], values["vocab_size"]
    num_dense = reader.integer("first_k_dense_replace", defaults.first_k_dense_replace, minimum=0)
    num_dense = min(num_dense, num_layers)
    # the list overrides `first_k_dense_replace`
    spare = spare_layers(reader)
    listed = reader.strings("mlp_layer_types", ("dense", "sparse"), num_layers, spare)
    values |= {
        "first_k_dense_replace": num_dense,
        "rope_theta": rope.theta,
        "rope": rope,
        "attention_bias": reader.boolean("attention_bias", False),
        "mlp_layer_types": listed
        or ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense),
        "indexer_types": read_indexer_types(reader, num_layers, defaults),
    }
    values |= read_tokens(reader, vocab_size)
    values |= read_quantization(reader)
    _check_consistency(reader, values)
    return values


def _read_num_experts(reader: FieldReader, defaults: ModelDefaults) -> int:
    """Read the number of routed experts, under any of its names."""
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    counts = {name: reader.integer(name, None) for name in names if reader.raw(name) is not None}
    if len(set(counts.values())) > 1:
        raise reader.error(names[0], counts, "one number under all names")
    return next(iter(counts.values()), defaults.n_routed_experts)


def _read_groups(reader: FieldReader, defaults: ModelDefaults) -> dict[str, int]:
    """Read the numbers of expert groups and of groups per token. Null is one group."""
    if reader.raw("n_group", defaults.n_group) is None:
        reader.choice("topk_group", None, (None, 1), "n_group null means one group")
        return {"n_group": 1, "topk_group": 1}
    return {
        name: reader.integer(name, getattr(defaults, name)) for name in ("n_group", "topk_group")
    }


def read_indexer_types(
    reader: FieldReader, num_layers: int, defaults: ModelDefaults
) -> tuple[str, ...]:
    """Read the kind of indexer of each layer: a list, a pattern or a schedule.

    Source: Hugging Face transformers 5.23, models/glm_moe_dsa/configuration_glm_moe_dsa.py.
    """
    spare, kinds = spare_layers(reader), ("full", "shared")
    reader.strings("layer_types", _LAYER_TYPES, num_layers, spare)
    types = reader.strings("indexer_types", kinds, num_layers, spare)
    pattern = reader.raw("index_topk_pattern")
    freq = max(reader.integer("index_topk_freq", 1, minimum=0), 1)
    offset = reader.integer("index_skip_topk_offset", 2, minimum=0)
    name = "indexer_types"
    if types is None and isinstance(pattern, str):
        name = "index_topk_pattern"
        if not num_layers <= len(pattern) <= num_layers + spare or set(pattern) - {"F", "S"}:
            raise reader.error(name, pattern, f"{num_layers} letters F or S, one a layer")
        types = tuple("full" if letter == "F" else "shared" for letter in pattern[:num_layers])
    elif types is None and pattern is not None:
        name = "index_topk_pattern"
        types = reader.strings(name, kinds, num_layers, spare)
    if types is None:
        name = "index_topk_freq"
        types = tuple(
            "full" if max(layer - offset + 1, 0) % freq == 0 else "shared"
            for layer in range(num_layers)
        )
    if types[0] != "full":
        raise reader.error(name, reader.raw(name), "a schedule whose layer 0 is full")
    if not defaults.shares_selections and "shared" in types:
        raise reader.error(name, reader.raw(name), f"full layers only in {defaults.model_type}")
    return types


def _check_consistency(reader: FieldReader, values: dict[str, Any]) -> None:
    """Refuse values that contradict each other."""
    heads, experts = values["num_attention_heads"], values["n_routed_experts"]
    groups, rope_dim = values["n_group"], values["qk_rope_head_dim"]
    reader.choice("num_key_value_heads", heads, (heads,), "MLA has one key for each query head")
    qk_head_dim = values["qk_nope_head_dim"] + rope_dim
    reader.choice("qk_head_dim", qk_head_dim, (qk_head_dim,))
    if rope_dim % 2:
        raise reader.error("qk_rope_head_dim", rope_dim, "an even number")
    if values["index_head_dim"] < rope_dim:
        raise reader.error(
            "index_head_dim", values["index_head_dim"], f"at least qk_rope_head_dim, {rope_dim}"
        )
    check_num_experts(reader, values)
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise reader.error(
            "n_group", groups, f"a divisor of n_routed_experts ({experts}), two experts a group"
        )
    if values["topk_group"] > groups:
        raise reader.error("topk_group", values["topk_group"], f"at most n_group, {groups}")
    reachable = experts // groups * values["topk_group"]
    if values["num_experts_per_tok"] > reachable:
        raise reader.error(
            "num_experts_per_tok",
            values["num_experts_per_tok"],
            f"at most {reachable}, the experts of topk_group groups",
        )
