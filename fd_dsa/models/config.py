"""Configuration of a model, read from a folder in Hugging Face format."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fd_dsa.errors import flag_error
from fd_dsa.models.config_reader import FieldReader, as_integer, read_json_object
from fd_dsa.models.families import FAMILIES, Family, check_family
from fd_dsa.models.rope_config import RopeConfig, read_rope, yarn_mscale

__all__ = ["ModelConfig", "RopeConfig"]

# fields of a family that are no field of config.json, or are read by functions of their own
_READ_APART = (
    "n_routed_experts",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "rope_theta",
    "shares_selections",
)
# many times the sizes of any model: lists of layers and experts, tables of positions and buffers of
# selections are made from these numbers before a weight is read
MOST = {
    "num_hidden_layers": 1024,
    "max_position_embeddings": 1 << 24,
    "vocab_size": 1 << 24,
    "index_topk": 1 << 16,
}
_MOST_WIDTH = 1 << 20
MOST_EXPERTS = 1 << 18

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
class ModelConfig(Family):
    """Everything about a model that its layers, caches and weights depend on.

    What its family says, where config.json says nothing else, and what only the file says. The
    names are those of Hugging Face's config.json (transformers 5.23); widths are numbers of
    elements, `max_position_embeddings` and `index_topk` tokens.

    Attributes:
        attention_bias: q_a_proj, kv_a_proj_with_mqa and o_proj have a bias.
        mlp_layer_types: "dense" or "sparse" (experts), one a layer.
        indexer_types: "full" (own indexer) or "shared" (uses the choice of the nearest "full"
            layer before it), one a layer.
        eos_token_ids: of config.json, then those that generation_config.json adds.
        weight_block_size: rows and columns of a block with one float32 multiplier, of FP8 weights
            (e4m3) stored [out, in]; None where the weights are plain.
        round_scales: scales of FP8 activations are powers of two (`scale_fmt` ue8m0).
        num_nextn_predict_layers: layers for multi-token prediction after the last one.
        mtp: tables that the first of them has of its own, if it is loaded; None = it is not. Lists
            of layers have an entry more for it.
        ranks: processes that share the model; heads and widths of MLPs are those of one of them.
        generation: parameters that generation_config.json proposes for requests that do not say;
            a temperature of 0 if the file turns sampling off (`do_sample` false), `max_tokens` of
            its `max_new_tokens`.
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
    round_scales: bool = False
    num_nextn_predict_layers: int = 0
    mtp: tuple[str, ...] | None = None
    ranks: int = 1
    generation: Mapping[str, float] = field(default_factory=dict)
    unknown_fields: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], *, allow_unknown: bool = False
    ) -> ModelConfig:
        """Configuration of the model in a folder.

        Reads config.json and, where it exists, generation_config.json.

        Args:
            allow_unknown: as of `from_dict`.

        Raises:
            ConfigError: a file is missing or damaged, or a value cannot be served; the message
                names the file and the field.
        """
        return cls.from_dict(*read_folder(folder), allow_unknown=allow_unknown)

    @classmethod
    def from_dict(
        cls,
        data: dict[str, Any],
        source: str = "config.json",
        generation: dict[str, Any] | None = None,
        generation_source: str = "generation_config.json",
        *,
        allow_unknown: bool = False,
    ) -> ModelConfig:
        """Configuration in parsed JSON; see `from_folder`.

        Args:
            allow_unknown: name unknown fields in `unknown_fields`. Otherwise they are refused,
                except for those that are known to be harmless.

        Raises:
            ConfigError: a value cannot be served, or a field is unknown.
        """
        reader = FieldReader(data, source)
        values = _read_fields(reader, FAMILIES[check_family(reader, FAMILIES)])
        values["unknown_fields"] = reader.unknown_fields(allowed=allow_unknown)
        add_generation(values, FieldReader(generation or {}, generation_source))
        return cls(**values)

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
        """What each of `size` ranks has: some of the heads, and of the columns of each MLP.

        Raises:
            ConfigError: the model cannot be split so.
        """
        if size == 1:
            return self
        parts = {}
        for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size"):
            width = getattr(self, name)
            if width % size:
                allowed = f"a divisor of the model's {name}, {width}"
                raise flag_error("tensor_parallel_size", size, allowed, "take another one")
            parts[name] = width // size
        return replace(self, ranks=size, **parts)

    @property
    def head_rows(self) -> int:
        """Tokens whose logits a rank computes: all where the head is the embedding, or uneven."""
        if self.tie_word_embeddings or self.vocab_size % self.ranks:
            return self.vocab_size
        return self.vocab_size // self.ranks

    def with_mtp_layer(self, *tables: str) -> ModelConfig:
        """The same with the layer for multi-token prediction, which has these tables of its own."""
        return replace(
            self,
            mtp=tables,
            mlp_layer_types=(*self.mlp_layer_types, self.mlp_layer_types[-1]),
            indexer_types=(*self.indexer_types, "full"),
        )

    @property
    def has_indexer(self) -> list[bool]:
        """Of each layer with caches: whether it has an indexer, that is an indexer cache too."""
        return [kind == "full" for kind in self.indexer_types]

    @property
    def num_indexer_layers(self) -> int:
        return sum(self.has_indexer)

    @property
    def most_dense_keys(self) -> int:
        """Tokens of a row up to which its last one attends to all of them."""
        return self.index_topk


def read_folder(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], str, dict[str, Any] | None, str]:
    """Arguments of `from_dict`: config.json and, where it exists, generation_config.json.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    path, generation_path = (
        Path(folder) / f"{name}.json" for name in ("config", "generation_config")
    )
    generation = read_json_object(generation_path) if generation_path.exists() else None
    return read_json_object(path), str(path), generation, str(generation_path)


def _read_fields(reader: FieldReader, family: Family) -> dict[str, Any]:
    """All fields of config.json, its family's where it has none."""
    values: dict[str, Any] = {one.name: getattr(family, one.name) for one in fields(Family)}
    plain = (one for one in fields(Family) if one.name not in _READ_APART)
    values |= read_plain(reader, ((one, values[one.name]) for one in plain))
    values["n_routed_experts"] = _read_num_experts(reader, family)
    values |= _read_groups(reader, family)
    for name, value in _FIXED.items():
        reader.choice(name, value, (value,))
    rope = read_rope(reader, family.rope_theta, values["max_position_embeddings"])
    num_layers, vocab_size = values["num_hidden_layers"], values["vocab_size"]
    num_dense = reader.integer("first_k_dense_replace", family.first_k_dense_replace, minimum=0)
    num_dense = min(num_dense, num_layers)
    # the list counts before `first_k_dense_replace`
    spare = spare_layers(reader)
    listed = reader.strings("mlp_layer_types", ("dense", "sparse"), num_layers, spare)
    values |= {
        "first_k_dense_replace": num_dense,
        "rope_theta": rope.theta,
        "rope": rope,
        "attention_bias": reader.boolean("attention_bias", False),
        "num_nextn_predict_layers": _num_mtp_layers(reader),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "mlp_layer_types": listed
        or ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense),
        "indexer_types": read_indexer_types(reader, num_layers, family),
        "bos_token_id": reader.token_id("bos_token_id", vocab_size, 0),
        "eos_token_ids": reader.token_ids("eos_token_id", vocab_size, 1),
        "pad_token_id": reader.token_id("pad_token_id", vocab_size),
    }
    values |= _read_quantization(reader)
    _check_consistency(reader, values)
    return values


def read_plain(reader: FieldReader, of: Iterable[tuple[Field[Any], Any]]) -> dict[str, Any]:
    """What config.json says of fields that are numbers or true or false, else their defaults."""
    values: dict[str, Any] = {}
    for one, default in of:
        name = one.name
        if one.type == "int":
            values[name] = reader.integer(name, default, maximum=MOST.get(name, _MOST_WIDTH))
        elif one.type == "float":
            values[name] = reader.positive(name, default)
        elif one.type == "bool":
            values[name] = reader.boolean(name, default)
    return values


def _read_num_experts(reader: FieldReader, family: Family) -> int:
    """Number of routed experts, under any of its names."""
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    counts = {name: reader.integer(name, None) for name in names if reader.raw(name) is not None}
    if len(set(counts.values())) > 1:
        raise reader.error(names[0], counts, "one number under all names")
    return next(iter(counts.values()), family.n_routed_experts)


def _read_groups(reader: FieldReader, family: Family) -> dict[str, int]:
    """Groups of experts and those that a token uses; null in both is one group."""
    if reader.raw("n_group", family.n_group) is None:
        reader.choice("topk_group", None, (None, 1), "n_group null means one group")
        return {"n_group": 1, "topk_group": 1}
    return {name: reader.integer(name, getattr(family, name)) for name in ("n_group", "topk_group")}


def _num_mtp_layers(reader: FieldReader) -> int:
    return reader.integer("num_nextn_predict_layers", 0, minimum=0)


def spare_layers(reader: FieldReader) -> int:
    """Entries that a list of layers may have after the last one, for multi-token prediction."""
    return max(_num_mtp_layers(reader), 1)


def read_indexer_types(reader: FieldReader, num_layers: int, family: Family) -> tuple[str, ...]:
    """Kind of indexer of each layer: the list, else the pattern, else the schedule.

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
    if not family.shares_selections and "shared" in types:
        raise reader.error(name, reader.raw(name), f"full layers only in {family.model_type}")
    return types


def _read_quantization(reader: FieldReader) -> dict[str, Any]:
    """Block size and kind of scales of quantised weights, if they are."""
    # the second is our own key, of a layer for multi-token prediction that alone is FP8
    names = "quantization_config", "mtp_quantization_config"
    found = [_read_fp8(one) for name in names if (one := reader.section(name)) is not None]
    if len(found) == 2 and found[0]["weight_block_size"] != found[1]["weight_block_size"]:
        size = found[0]["weight_block_size"]
        raise reader.error(names[1], reader.raw(names[1]), f"blocks of {size}, as in {names[0]}")
    return found[0] if found else {}


def _read_fp8(section: FieldReader) -> dict[str, Any]:
    """Return block size and kind of scales that one object names."""
    section.choice("quant_method", None, ("fp8",))
    section.choice("fmt", "e4m3", ("e4m3",))
    section.choice("activation_scheme", "dynamic", ("dynamic",))
    scale_fmt = section.choice("scale_fmt", None, (None, "ue8m0", "float"))
    section.choice("expert_dtype", "fp8", ("fp8",))
    size = section.raw("weight_block_size", [128, 128])
    blocks = [as_integer(n) or 0 for n in size] if isinstance(size, (list, tuple)) else []
    if len(blocks) != 2 or min(blocks) < 1:
        raise section.error("weight_block_size", size, "two integers of at least 1")
    return {"weight_block_size": (blocks[0], blocks[1]), "round_scales": scale_fmt == "ue8m0"}


def add_generation(values: dict[str, Any], reader: FieldReader) -> None:
    """Add proposals for requests, and more end-of-text tokens, of generation_config.json."""
    more_eos = reader.token_ids("eos_token_id", values["vocab_size"])
    values["eos_token_ids"] = tuple(dict.fromkeys(values["eos_token_ids"] + more_eos))
    names = ("temperature", "top_p", "min_p", "repetition_penalty")
    proposed = {name: reader.number(name, None) for name in names if reader.raw(name) is not None}
    if reader.raw("top_k") is not None:
        proposed["top_k"] = reader.integer("top_k", None, minimum=0)
    if reader.raw("max_new_tokens") is not None:
        proposed["max_tokens"] = reader.integer("max_new_tokens", None, minimum=1)
    if not (reader.raw("do_sample") is None or reader.boolean("do_sample", True)):
        proposed["temperature"] = 0.0
    values["generation"] = proposed


def _check_consistency(reader: FieldReader, values: dict[str, Any]) -> None:
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
    if experts * layers > MOST_EXPERTS:
        most = MOST_EXPERTS // layers
        raise reader.error("n_routed_experts", experts, f"at most {most} in {layers} layers")
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
