"""Configuration of models with the layers of DeepSeek-V3.2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from fd_dsa.cache_formats import FP8_BLOCK_SIZE, CacheLayout
from fd_dsa.errors import flag_error
from fd_dsa.models.config_reader import FieldReader
from fd_dsa.models.defaults import ModelDefaults
from fd_dsa.models.packing import Packing
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
# many times the sizes of any model, because lists of layers and experts, tables of positions and
# buffers of selections are allocated before a weight is read
MAX_SIZES = {
    "num_hidden_layers": 1024,
    "max_position_embeddings": 1 << 24,
    "vocab_size": 1 << 24,
    "index_topk": 1 << 16,
}
_MAX_WIDTH = 1 << 20
# of all layers together
MAX_MODEL_EXPERTS = 1 << 18

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(ModelDefaults):
    """Everything about a model that its layers, caches and weights depend on.

    A field of config.json overrides the family's default. The names are those of Hugging
    Face's config.json (transformers 5.23). Widths are numbers of elements,
    `max_position_embeddings` and `index_topk` are numbers of tokens.

    Attributes:
        attention_bias: q_a_proj, kv_a_proj_with_mqa and o_proj have a bias.
        mlp_layer_types: "dense" or "sparse" (experts), one per layer.
        indexer_types: "full" (own indexer) or "shared" (uses the selection of the nearest "full"
            layer before it), one per layer.
        eos_token_ids: end-of-text tokens of config.json, then those of generation_config.json.
        weight_block_size: rows and columns of a block with one float32 scale in FP8 weights (e4m3,
            stored [out, in]); None = no FP8 weights.
        packing: layout of the matrices in four bits; None = there are none.
        round_scales: scales of FP8 activations are powers of two (`scale_fmt` ue8m0).
        num_nextn_predict_layers: layers for multi-token prediction after the last one.
        mtp: tables that the loaded MTP layer has in addition to the model's; None = no MTP layer
            is loaded. A loaded layer has an entry in the lists of layers.
        ranks: processes that share the model. Heads and widths of MLPs are those of one rank.
        generation: defaults of requests in generation_config.json. `do_sample` false is a
            temperature of 0, `max_new_tokens` is `max_tokens`.
        unknown_fields: fields of config.json that are ignored although they may change results.
    """

    rope: RopeConfig
    attention_bias: bool
    tie_word_embeddings: bool
    mlp_layer_types: tuple[str, ...]
    indexer_types: tuple[str, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    weight_block_size: tuple[int, int] | None = None
    packing: Packing | None = None
    round_scales: bool = False
    num_nextn_predict_layers: int = 0
    mtp: tuple[str, ...] | None = None
    ranks: int = 1
    generation: Mapping[str, float] = field(default_factory=dict)
    unknown_fields: tuple[str, ...] = field(default=(), compare=False)

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

    def split(self, size: int) -> ModelConfig:
        """Return the part of one of `size` ranks: its heads, and its columns of each MLP.

        Raises:
            ConfigError: heads or columns are no multiple of `size`.
        """
        if size == 1:
            return self
        names = "num_attention_heads", "intermediate_size", "moe_intermediate_size"
        return replace(self, ranks=size, **split_fields(self, size, names))

    @property
    def head_rows(self) -> int:
        """Rows of the head that a rank computes, see `rows_of_head`."""
        return rows_of_head(self.vocab_size, self.ranks, is_tied=self.tie_word_embeddings)

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


def split_fields(config: object, size: int, names: Iterable[str]) -> dict[str, Any]:
    """Return the named widths of a configuration, divided among `size` ranks.

    Raises:
        ConfigError: a width is no multiple of `size`.
    """
    parts = {}
    for name in names:
        width = getattr(config, name)
        if width % size:
            allowed = f"a divisor of the model's {name}, {width}"
            raise flag_error("tensor_parallel_size", size, allowed, "take another one")
        parts[name] = width // size
    return parts


def rows_of_head(vocab_size: int, ranks: int, *, is_tied: bool) -> int:
    """Return the rows of the head that a rank computes.

    The whole vocabulary if the head is the embedding, or if ranks do not divide it.
    """
    return vocab_size if is_tied or vocab_size % ranks else vocab_size // ranks


def _read_fields(reader: FieldReader, defaults: ModelDefaults) -> dict[str, Any]:
    """Read all fields of config.json, with defaults of those that it leaves out."""
    values: dict[str, Any] = {
        one.name: getattr(defaults, one.name) for one in fields(ModelDefaults)
    }
    plain = (one for one in fields(ModelDefaults) if one.name not in _READ_APART)
    values |= read_plain(reader, ((one, values[one.name]) for one in plain))
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
        "num_nextn_predict_layers": num_mtp_layers(reader),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "mlp_layer_types": listed
        or ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense),
        "indexer_types": read_indexer_types(reader, num_layers, defaults),
        "bos_token_id": reader.token_id("bos_token_id", vocab_size, 0),
        "eos_token_ids": reader.token_ids("eos_token_id", vocab_size, 1),
        "pad_token_id": reader.token_id("pad_token_id", vocab_size),
    }
    values |= read_quantization(reader)
    _check_consistency(reader, values)
    return values


def read_plain(reader: FieldReader, of: Iterable[tuple[Field[Any], Any]]) -> dict[str, Any]:
    """Read fields that are numbers or booleans.

    Args:
        of: fields of a dataclass, each with the default of a file that leaves it out.
    """
    values: dict[str, Any] = {}
    for one, default in of:
        name = one.name
        if one.type == "int":
            values[name] = reader.integer(name, default, maximum=MAX_SIZES.get(name, _MAX_WIDTH))
        elif one.type == "float":
            values[name] = reader.positive(name, default)
        elif one.type == "bool":
            values[name] = reader.boolean(name, default)
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


def num_mtp_layers(reader: FieldReader) -> int:
    """Read the number of MTP layers."""
    return reader.integer("num_nextn_predict_layers", 0, minimum=0)


def spare_layers(reader: FieldReader) -> int:
    """Return the number of entries that lists of layers may have for MTP layers."""
    return max(num_mtp_layers(reader), 1)


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


def read_generation(
    reader: FieldReader, vocab_size: int, end_tokens: tuple[int, ...]
) -> tuple[dict[str, float], tuple[int, ...]]:
    """Read generation_config.json.

    Args:
        reader: top level of the file.
        vocab_size: number of tokens.
        end_tokens: end-of-text tokens of config.json.

    Returns:
        Proposed parameters of requests, and all end-of-text tokens.

    Raises:
        ConfigError: a value is not allowed. The message names the file and the field.
    """
    more = reader.token_ids("eos_token_id", vocab_size)
    names = ("temperature", "top_p", "min_p", "repetition_penalty")
    proposed = {name: reader.number(name, None) for name in names if reader.raw(name) is not None}
    if reader.raw("top_k") is not None:
        proposed["top_k"] = reader.integer("top_k", None, minimum=-1)
    if reader.raw("max_new_tokens") is not None:
        proposed["max_tokens"] = reader.integer("max_new_tokens", None, minimum=1)
    if not (reader.raw("do_sample") is None or reader.boolean("do_sample", True)):
        proposed["temperature"] = 0.0
    return proposed, tuple(dict.fromkeys(end_tokens + more))


def _check_consistency(reader: FieldReader, values: dict[str, Any]) -> None:
    """Refuse values that contradict each other."""
    heads, experts = values["num_attention_heads"], values["n_routed_experts"]
    layers = values["num_hidden_layers"]
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
    if experts * layers > MAX_MODEL_EXPERTS:
        limit = MAX_MODEL_EXPERTS // layers
        raise reader.error("n_routed_experts", experts, f"at most {limit} in {layers} layers")
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
