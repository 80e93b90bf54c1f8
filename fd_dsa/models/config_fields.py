"""The fields of config.json and generation_config.json: defaults, allowed values, consistency."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

from fd_dsa.models.config_reader import INT32_MAX, FieldReader
from fd_dsa.models.families import Family
from fd_dsa.models.rope_config import read_rope

logger = logging.getLogger(__name__)

# what counts something, at least one; the two others are read by functions of their own
_SIZES = tuple(
    one.name
    for one in fields(Family)
    if one.type == "int" and one.name not in ("n_routed_experts", "first_k_dense_replace")
)
# many times what any model has; a list is made of so many layers and experts, and a table of so
# many positions, before a weight is looked at
_MOST = {"num_hidden_layers": 1024, "max_position_embeddings": 1 << 24}
_MOST_EXPERTS = 1 << 18

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
# fields that do not touch what the main model computes, or repeat another field
_HARMLESS = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "dtype",
        "ep_size",
        "head_dim",
        "index_share_for_mtp_iteration",
        "initializer_range",
        "model_type",
        "num_nextn_predict_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",
        "return_dict",
        "router_aux_loss_coef",
        "seq_aux",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
_HARMLESS_QUANTIZATION = frozenset(
    (
        "dequantize",
        "ignored_layers",
        "modules_to_convert",
        "modules_to_not_convert",
    )
)


@dataclass(frozen=True, slots=True)
class Fp8BlockQuant:
    """FP8 weights (e4m3) with one float32 multiplier a block.

    Attributes:
        weight_block_size: rows and columns of a block, of weights stored [out, in].
    """

    weight_block_size: tuple[int, int] = (128, 128)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json proposes for requests which do not say; None where it is silent.

    `temperature` is 0 where the file turns sampling off (`do_sample` false).
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_fields(reader: FieldReader, family: Family) -> dict[str, Any]:
    """All fields of config.json except the model's type."""
    values: dict[str, Any] = {
        name: reader.integer(name, getattr(family, name), maximum=_MOST.get(name, INT32_MAX))
        for name in _SIZES
    }
    values["n_routed_experts"] = _read_num_experts(reader, family)
    for name, value in _FIXED.items():
        reader.choice(name, value, (value,))
    rope, unread = read_rope(reader, family.rope_theta, values["max_position_embeddings"])
    quantization, more_unread = _read_quantization(reader)
    num_layers, vocab_size = values["num_hidden_layers"], values["vocab_size"]
    values |= {
        "routed_scaling_factor": reader.positive(
            "routed_scaling_factor", family.routed_scaling_factor
        ),
        "norm_topk_prob": reader.boolean("norm_topk_prob", family.norm_topk_prob),
        "rms_norm_eps": reader.positive("rms_norm_eps", family.rms_norm_eps),
        "mla_norm_eps": reader.positive("mla_norm_eps", 1e-6),
        "rope": rope,
        "indexer_rope_interleave": reader.boolean(
            "indexer_rope_interleave", family.indexer_rope_interleave
        ),
        "attention_bias": reader.boolean("attention_bias", False),
        "mlp_bias": False,
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "mlp_layer_types": _read_mlp_layer_types(reader, num_layers, family),
        "indexer_types": read_indexer_types(reader, num_layers, family),
        "bos_token_id": reader.token_id("bos_token_id", vocab_size, 0),
        "eos_token_ids": reader.token_ids("eos_token_id", vocab_size, 1),
        "pad_token_id": reader.token_id("pad_token_id", vocab_size),
        "quantization": quantization,
    }
    _check_consistency(reader, values)
    unknown = [name for name in reader.unread() if name not in _HARMLESS] + unread + more_unread
    if unknown:
        logger.warning("%s: unknown fields, ignored: %s", reader.source, ", ".join(unknown))
    return values


def _read_num_experts(reader: FieldReader, family: Family) -> int:
    """Number of routed experts, under any of its names."""
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    counts = {name: reader.integer(name, None) for name in names if reader.raw(name) is not None}
    if len(set(counts.values())) > 1:
        raise reader.error(names[0], counts, "one number under all names")
    return next(iter(counts.values()), family.n_routed_experts)


def _read_mlp_layer_types(reader: FieldReader, num_layers: int, family: Family) -> tuple[str, ...]:
    """Kind of MLP of each layer; the list counts before `first_k_dense_replace`."""
    num_dense = reader.integer("first_k_dense_replace", family.first_k_dense_replace, minimum=0)
    num_dense = min(num_dense, num_layers)
    listed = reader.strings("mlp_layer_types", ("dense", "sparse"), num_layers)
    return listed or ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense)


def read_indexer_types(reader: FieldReader, num_layers: int, family: Family) -> tuple[str, ...]:
    """Kind of indexer of each layer: the list, else the pattern, else the schedule.

    Source: Hugging Face transformers 5.23, models/glm_moe_dsa/configuration_glm_moe_dsa.py.
    """
    reader.strings("layer_types", _LAYER_TYPES, num_layers)
    types = reader.strings("indexer_types", ("full", "shared"), num_layers)
    pattern = reader.raw("index_topk_pattern")
    freq = max(reader.integer("index_topk_freq", 1, minimum=0), 1)
    offset = reader.integer("index_skip_topk_offset", 2, minimum=0)
    name = "indexer_types"
    if types is None and isinstance(pattern, str):
        name = "index_topk_pattern"
        if len(pattern) != num_layers or set(pattern) - {"F", "S"}:
            raise reader.error(name, pattern, f"{num_layers} letters F or S, one a layer")
        types = tuple("full" if letter == "F" else "shared" for letter in pattern)
    elif types is None and pattern is not None:
        name = "index_topk_pattern"
        types = reader.strings(name, ("full", "shared"), num_layers)
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


def _read_quantization(reader: FieldReader) -> tuple[Fp8BlockQuant | None, list[str]]:
    """Quantisation of the weights, and the fields that were not understood."""
    section = reader.section("quantization_config")
    if section is None:
        return None, []
    section.choice("quant_method", None, ("fp8",))
    section.choice("fmt", "e4m3", ("e4m3",))
    section.choice("activation_scheme", "dynamic", ("dynamic",))
    section.choice("scale_fmt", None, (None, "ue8m0", "float"))
    section.choice("expert_dtype", "fp8", ("fp8",))
    size = section.raw("weight_block_size", [128, 128])
    if not (isinstance(size, list) and len(size) == 2 and all(map(_is_count, size))):
        raise section.error("weight_block_size", size, "two integers of at least 1")
    unread = [
        name
        for name in section.unread()
        if name.removeprefix("quantization_config.") not in _HARMLESS_QUANTIZATION
    ]
    return Fp8BlockQuant((size[0], size[1])), unread


def read_generation(
    reader: FieldReader, vocab_size: int
) -> tuple[GenerationDefaults, tuple[int, ...]]:
    """Proposals for requests, and the end-of-text tokens, of generation_config.json."""
    eos_token_ids = reader.token_ids("eos_token_id", vocab_size)
    numbers = {
        name: reader.number(name, None)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        if reader.raw(name) is not None
    }
    counts = {
        name: reader.integer(name, None, minimum=0)
        for name in ("top_k", "max_new_tokens")
        if reader.raw(name) is not None
    }
    if not (reader.raw("do_sample") is None or reader.boolean("do_sample", True)):
        numbers["temperature"] = 0.0
    return GenerationDefaults(**numbers, **counts), eos_token_ids


def _check_consistency(reader: FieldReader, values: dict[str, Any]) -> None:
    """Refuse fields that contradict one another."""
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
    if experts * layers > _MOST_EXPERTS:
        most = _MOST_EXPERTS // layers
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


def _is_count(value: object) -> bool:
    """Whether a JSON value is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
