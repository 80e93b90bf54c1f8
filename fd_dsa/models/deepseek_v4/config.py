"""Configuration of DeepSeek-V4 models, as DeepSeek or Hugging Face writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fd_dsa.cache_formats import FP8_BLOCK_SIZE, PooledLayer, V4CacheLayout
from fd_dsa.errors import flag_error
from fd_dsa.models.config_reader import FieldReader, as_integer
from fd_dsa.models.defaults import DeepseekV4Defaults
from fd_dsa.models.dequantize import FP4_GROUP
from fd_dsa.models.family_fields import (
    FamilyFields,
    check_num_experts,
    read_numbers,
    read_tokens,
    spare_layers,
)
from fd_dsa.models.quantization import read_fp8
from fd_dsa.models.rope_config import ROPE_FIELDS, RopeConfig, read_section

WINDOW, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
_TYPE_OF_RATIO = {0: WINDOW, 4: CSA, 128: HCA}
_RATES = {CSA: 4, HCA: 128}
_OLD_RATES = {CSA: "compress_rate_csa", HCA: "compress_rate_hca"}
# softmax is unsupported, as in transformers
_SCORES = ("sqrtsoftplus", "sigmoid")
_EXPERT_DTYPES = ("fp4", "fp8")
# fields of checkpoints with a vision encoder, as transformers and as DeepSeek write them
_VISION = ("vision_config", "vision_dim", "vision_n_layers")

# another name of a field -> the field
_SAME = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "intermediate_size": "moe_intermediate_size",
}
# fields with one supported value, because another value changes results or transformers ignores it
_FIXED: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
}


@dataclass(frozen=True, kw_only=True)
class DeepseekV4Config(DeepseekV4Defaults, FamilyFields):
    """Settings that layers, caches and weights of a DeepSeek-V4 model depend on.

    Attributes:
        qk_rope_head_dim: rotated channels, the last ones of a head.
        layer_types: `sliding_attention`, `compressed_sparse_attention` (CSA) or
            `heavily_compressed_attention` (HCA), one per layer.
        compress_rates: tokens per entry of a CSA and of an HCA layer.
        mlp_layer_types: `hash_moe` (experts by token id) or `moe`, one per layer.
        main_rope, compress_rope: angles of window-only layers, and of the others.
        expert_dtype: type of quantised routed experts, "fp4" or "fp8"; None = not given.
    """

    split_names = "num_attention_heads", "o_groups", "moe_intermediate_size"

    qk_rope_head_dim: int
    scoring_func: str
    layer_types: tuple[str, ...]
    compress_rates: Mapping[str, int]
    main_rope: RopeConfig
    compress_rope: RopeConfig
    expert_dtype: str | None = None

    @classmethod
    def read(cls, reader: FieldReader, defaults: DeepseekV4Defaults) -> DeepseekV4Config:
        """Return the configuration in a config.json.

        Args:
            reader: top level of the file.
            defaults: values of the numbers that the file leaves out.

        Raises:
            ConfigError: a value is unsupported. The message names the file and the field.
        """
        return cls(**_read_fields(reader, defaults))

    def split(self, size: int) -> DeepseekV4Config:
        """Return the part of one of `size` ranks: its heads, and its columns of each expert.

        Raises:
            ConfigError: heads, their groups or columns are no multiple of `size`, or the columns of
                FP4 experts are no whole groups.
        """
        part = super().split(size)
        if self.expert_dtype == "fp4" and part.moe_intermediate_size % FP4_GROUP:
            raise flag_error(
                "tensor_parallel_size",
                size,
                f"one that leaves each rank whole groups of {FP4_GROUP} of FP4 experts",
                f"moe_intermediate_size {self.moe_intermediate_size} would be split into parts of "
                f"{part.moe_intermediate_size}",
            )
        return part

    def with_mtp_layer(self) -> DeepseekV4Config:
        """Return the configuration with the MTP layer, which has a window and scored experts."""
        return replace(
            self,
            mtp=(),
            layer_types=(*self.layer_types, WINDOW),
            mlp_layer_types=(*self.mlp_layer_types, "moe"),
        )

    @property
    def has_indexer(self) -> list[bool]:
        """True for each layer that selects the entries it attends to."""
        return [kind == CSA for kind in self.layer_types]

    @property
    def max_dense_keys(self) -> int:
        """Max tokens of a row whose last token still attends to every CSA entry."""
        return (self.index_topk + 1) * self.compress_rates[CSA] - 1

    def pooled_tokens(self, kind: str) -> int:
        """Return the tokens that an entry pools, for CSA also those of the previous entry."""
        ratio = self.compress_rates[kind]
        return 2 * ratio if kind == CSA else ratio

    @property
    def default_block_size(self) -> int:
        """The least number of tokens from 64 on that makes whole entries of all kinds."""
        entries = math.lcm(*self.compress_rates.values())
        return -(-FP8_BLOCK_SIZE // entries) * entries

    def cache_layout(
        self, kv_cache_dtype: str, block_size: int, max_drafts: int = 0
    ) -> V4CacheLayout:
        """Return the layout of the caches.

        Args:
            kv_cache_dtype: "float32", the only format of the pools.
            block_size: tokens of a block.
            max_drafts: maximum number of drafts of a row.

        Raises:
            ConfigError: the format is unsupported, or a block does not hold whole entries.
        """
        if kv_cache_dtype != "float32":
            raise flag_error(
                "kv_cache_dtype",
                kv_cache_dtype,
                f"auto or float32 with {self.model_type}",
                "leave it out",
            )
        pools = {
            WINDOW: PooledLayer(self.head_dim),
            CSA: PooledLayer(self.head_dim, self.compress_rates[CSA], self.index_head_dim),
            HCA: PooledLayer(self.head_dim, self.compress_rates[HCA]),
        }
        layers = tuple(pools[kind] for kind in self.layer_types)
        rates = tuple(self.compress_rates.values())
        return V4CacheLayout(layers, rates, block_size, max_drafts)


def _read_fields(reader: FieldReader, defaults: DeepseekV4Defaults) -> dict[str, Any]:
    """Read all fields of config.json and check them against each other."""
    for name in _VISION:
        if reader.raw(name) is not None:
            hint = "DeepSeek-V4 with images is not served; vLLM or SGLang may serve it"
            raise reader.error(name, reader.raw(name), "no fields of a vision model", hint)
    values = read_numbers(reader, defaults)
    for name, same in _SAME.items():
        reader.choice(name, values[same], (values[same],), f"as {same}")
    for name, value in _FIXED.items():
        reader.choice(name, value, (value,))
    num_layers, vocab_size = values["num_hidden_layers"], values["vocab_size"]
    values |= {
        "qk_rope_head_dim": _read_rope_dim(reader, values["head_dim"]),
        "scoring_func": reader.choice("scoring_func", "sqrtsoftplus", _SCORES),
        "layer_types": _read_layer_types(reader, num_layers),
        "compress_rates": _read_rates(reader),
        "mlp_layer_types": _read_mlp_types(reader, num_layers),
    }
    values |= read_tokens(reader, vocab_size)
    share = values["qk_rope_head_dim"] / values["head_dim"]
    values["main_rope"], values["compress_rope"] = _read_ropes(
        reader, values["max_position_embeddings"], share
    )
    values |= _read_quantization(reader)
    _check_consistency(reader, values)
    return values


def _read_quantization(reader: FieldReader) -> dict[str, Any]:
    """Read the types of quantised weights. DeepSeek puts the experts' at the top of the file."""
    name, section = "expert_dtype", reader.section("quantization_config")
    experts = reader.choice(name, None, (None, *_EXPERT_DTYPES))
    if section is None:
        return {name: experts}
    found = read_fp8(section, _EXPERT_DTYPES)
    own = section.raw(name)
    if None not in (own, experts) and own != experts:
        raise section.error(name, own, f"{experts!r}, as at the top of the file")
    return {**found, name: experts or own}


def _read_rope_dim(reader: FieldReader, head_dim: int) -> int:
    """Read the number of rotated channels, also given as a fraction of the head."""
    factor = None
    if reader.raw("partial_rotary_factor") is not None:
        factor = reader.positive("partial_rotary_factor", None)
    width = None
    if reader.raw("qk_rope_head_dim") is not None:
        width = reader.integer("qk_rope_head_dim", None)
    found = int(head_dim * (0.125 if factor is None else factor)) if width is None else width
    if factor is not None and int(head_dim * factor) != found:
        allowed = f"head_dim * partial_rotary_factor = {int(head_dim * factor)}"
        raise reader.error("qk_rope_head_dim", found, allowed, "correct one of the two")
    if found % 2 or not 0 < found <= head_dim:
        name = "qk_rope_head_dim" if factor is None else "partial_rotary_factor"
        allowed = f"an even number of rotated channels, from 2 to head_dim = {head_dim}"
        raise reader.error(name, found if factor is None else factor, allowed)
    return found


def _read_layer_types(reader: FieldReader, num_layers: int) -> tuple[str, ...]:
    """Read the kind of each layer, without the entries of MTP layers."""
    name, allowed = "layer_types", _TYPE_OF_RATIO.values()
    listed, ratios = reader.raw(name), reader.raw("compress_ratios")
    if listed is None and ratios is not None:
        name = "compress_ratios"
        own = [as_integer(one) for one in ratios] if isinstance(ratios, (list, tuple)) else [None]
        if None in own:
            raise reader.error(name, ratios, "a list of one integer per layer")
        if odd := [ratio for ratio in own[:num_layers] if ratio not in _TYPE_OF_RATIO]:
            raise reader.error(
                name, odd[0], "0, 4 or 128", "set others by layer_types and compress_rates"
            )
        listed = [_TYPE_OF_RATIO[ratio] for ratio in own[:num_layers] if ratio is not None]
    if listed is None:
        raise reader.error(
            name,
            None,
            "layer_types or compress_ratios",
            "no default fits every model; add either one",
        )
    if not isinstance(listed, (list, tuple)) or len(listed) < num_layers:
        raise reader.error(name, reader.raw(name), f"a list of at least {num_layers}, one a layer")
    for index, kind in enumerate(listed):
        if kind not in allowed:
            raise reader.error(f"{name}[{index}]", kind, ", ".join(map(repr, allowed)))
    return tuple(listed[:num_layers])


def _read_rates(reader: FieldReader) -> dict[str, int]:
    """Read the number of tokens per entry, by kind of layer."""
    section = reader.section("compress_rates")
    rates = {}
    for kind, default in _RATES.items():
        old = reader.integer(_OLD_RATES[kind], default)
        rates[kind] = old if section is None else section.integer(kind, old)
    if rates[CSA] >= rates[HCA]:
        raise reader.error("compress_rates", rates, f"a higher rate of {HCA} than of {CSA}")
    return rates


def _read_mlp_types(reader: FieldReader, num_layers: int) -> tuple[str, ...]:
    """Read the kind of experts of each layer: selected by token id or by score."""
    num_hash = min(reader.integer("num_hash_layers", 3, minimum=0), num_layers)
    spare = spare_layers(reader)
    listed = reader.strings("mlp_layer_types", ("hash_moe", "moe"), num_layers, spare)
    return listed or ("hash_moe",) * num_hash + ("moe",) * (num_layers - num_hash)


def _read_ropes(reader: FieldReader, longest: int, share: float) -> tuple[RopeConfig, RopeConfig]:
    """Read the angles of window-only layers and of the others.

    Transformers writes one section for each. Released checkpoints have one `rope_scaling`, which
    applies only to layers with entries.

    Args:
        longest: max_position_embeddings, tokens.
        share: rotated fraction of a head.
    """
    thetas = reader.positive("rope_theta", 1e4), reader.positive("compress_rope_theta", 1.6e5)
    names = "rope_parameters", "rope_scaling"
    sections = [one for name in names if (one := reader.section(name)) is not None]
    factor = reader.raw("partial_rotary_factor")
    share = share if factor is None else factor
    pairs = [_read_rope_pair(one, thetas, longest, share) for one in sections]
    if len(pairs) == 2 and pairs[0] != pairs[1]:
        raise reader.error(names[1], pairs[1], f"the same as {names[0]}, {pairs[0]}", "remove one")
    return pairs[0] if pairs else (RopeConfig(theta=thetas[0]), RopeConfig(theta=thetas[1]))


def _read_rope_pair(
    section: FieldReader, thetas: tuple[float, float], longest: int, share: float
) -> tuple[RopeConfig, RopeConfig]:
    """Read both angles from one object, with or without `main` and `compress`."""
    main, compress = section.section("main"), section.section("compress")
    if main is None or compress is None:
        section.raw("rope_theta")
        return RopeConfig(theta=thetas[0]), _read_rope(section, thetas[1], longest)
    for name in (*ROPE_FIELDS, "rope_theta", "partial_rotary_factor"):
        # transformers ignores these fields beside `main` and `compress`
        section.raw(name)
    main.choice("rope_type", "default", ("default",))
    for one in (main, compress):
        one.choice("partial_rotary_factor", share, (share,), "as at the top of the file")
    # without this factor transformers scales cos and sin, and no V4 model is trained that way
    if compress.raw("rope_type") == "yarn" and compress.raw("attention_factor") is None:
        raise compress.error("attention_factor", None, "1.0")
    ropes = [
        _read_rope(one, one.positive("rope_theta", theta), longest)
        for one, theta in zip((main, compress), thetas, strict=True)
    ]
    return ropes[0], ropes[1]


def _read_rope(section: FieldReader, theta: float, longest: int) -> RopeConfig:
    """Read plain or YaRN angles, without a scale of cos and sin."""
    for name in ("mscale", "mscale_all_dim", "partial_rotary_factor"):
        # without effect, because cos and sin are not scaled
        section.raw(name)
    section.choice("attention_factor", 1.0, (1.0, 1, None), "V4 scales neither cos nor sin")
    original = section.raw("original_max_position_embeddings")
    if original is not None:
        original = section.integer("original_max_position_embeddings", None)
    return read_section(section, theta, original or longest, has_factor=True)


def _check_consistency(reader: FieldReader, values: dict[str, Any]) -> None:
    """Refuse values that contradict each other."""
    heads, groups = values["num_attention_heads"], values["o_groups"]
    if heads % groups:
        raise reader.error("o_groups", groups, f"a divisor of num_attention_heads, {heads}")
    for name in ("hidden_size", "moe_intermediate_size"):
        if values["expert_dtype"] == "fp4" and values[name] % FP4_GROUP:
            hint = "FP4 experts have a scale for each of these groups"
            raise reader.error(name, values[name], f"a multiple of {FP4_GROUP}", hint)
    if values["index_head_dim"] < values["qk_rope_head_dim"]:
        allowed = f"at least the rotated channels, {values['qk_rope_head_dim']}"
        raise reader.error("index_head_dim", values["index_head_dim"], allowed)
    check_num_experts(reader, values)
    experts = values["n_routed_experts"]
    if values["num_experts_per_tok"] > experts:
        allowed = f"at most n_routed_experts, {experts}"
        raise reader.error("num_experts_per_tok", values["num_experts_per_tok"], allowed)
