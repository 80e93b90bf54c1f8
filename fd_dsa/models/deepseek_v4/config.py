"""Configuration of a DeepSeek-V4 model, in every form that its config.json is found in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from fd_dsa.models.config import MOST_EXPERTS, add_generation, read_plain, spare_layers
from fd_dsa.models.config_reader import FieldReader, as_integer
from fd_dsa.models.rope_config import ROPE_FIELDS, RopeConfig, read_section

WINDOW, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
_TYPE_OF_RATIO = {0: WINDOW, 4: CSA, 128: HCA}
_RATES = {CSA: 4, HCA: 128}
_OLD_RATES = {CSA: "compress_rate_csa", HCA: "compress_rate_hca"}
# transformers has no softmax here
_SCORES = ("sqrtsoftplus", "sigmoid")

# other names of a field
_SAME = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "intermediate_size": "moe_intermediate_size",
}
# fields with one supported value: any other would change the result, or Hugging Face ignores it
_FIXED: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV4Config:
    """Everything about a DeepSeek-V4 model that its layers, caches and weights depend on.

    The names are those of Hugging Face's config.json (transformers 5.23); widths are numbers of
    elements, `sliding_window` and `max_position_embeddings` tokens, `index_topk` CSA entries. A
    number's default is what a config.json that leaves it out stands for.

    Attributes:
        qk_rope_head_dim: channels that are rotated, the last ones of a head.
        layer_types: `sliding_attention`, `compressed_sparse_attention` (CSA) or
            `heavily_compressed_attention` (HCA), one a layer.
        compress_rates: tokens per entry of a CSA and of an HCA layer.
        mlp_layer_types: `hash_moe` (experts by token id) or `moe`, one a layer.
        main_rope, compress_rope: angles of window-only layers, and of the others.
        eos_token_ids, generation, unknown_fields: as of `ModelConfig`.
    """

    model_type: str = "deepseek_v4"
    vocab_size: int = 129280
    hidden_size: int = 4096
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    head_dim: int = 512
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    num_experts_per_tok: int = 6
    n_routed_experts: int = 256
    max_position_embeddings: int = 1048576
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    rms_norm_eps: float = 1e-6
    hc_eps: float = 1e-6
    qk_rope_head_dim: int
    scoring_func: str
    layer_types: tuple[str, ...]
    compress_rates: Mapping[str, int]
    mlp_layer_types: tuple[str, ...]
    main_rope: RopeConfig
    compress_rope: RopeConfig
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    generation: Mapping[str, float] = field(default_factory=dict)
    unknown_fields: tuple[str, ...] = field(default=(), compare=False)
    # FP8 checkpoints are refused
    weight_block_size: None = None
    round_scales: bool = False

    @classmethod
    def from_dict(
        cls,
        data: dict[str, Any],
        source: str = "config.json",
        generation: dict[str, Any] | None = None,
        generation_source: str = "generation_config.json",
        *,
        allow_unknown: bool = False,
    ) -> DeepseekV4Config:
        """Configuration in parsed JSON, as `ModelConfig.from_dict`.

        Raises:
            ConfigError: a value cannot be served, or a field is unknown; names file, field, value
                and what is allowed.
        """
        reader = FieldReader(data, source)
        values = _read_fields(reader)
        values["unknown_fields"] = reader.unknown_fields(allowed=allow_unknown)
        add_generation(values, FieldReader(generation or {}, generation_source))
        return cls(**values)

    @property
    def has_indexer(self) -> list[bool]:
        """Whether each layer chooses what it attends to."""
        return [kind == CSA for kind in self.layer_types]

    @property
    def most_dense_keys(self) -> int:
        """Tokens of a row up to which its last one attends to every CSA entry."""
        return (self.index_topk + 1) * self.compress_rates[CSA] - 1


def _read_fields(reader: FieldReader) -> dict[str, Any]:
    """All fields of config.json, checked against each other."""
    if reader.raw("quantization_config") is not None or reader.raw("expert_dtype") is not None:
        raise reader.error(
            "quantization_config",
            reader.raw("quantization_config", {"expert_dtype": reader.raw("expert_dtype")}),
            "none",
            "deepseek_v4 is served from float32 or bfloat16 weights; dequantise the checkpoint",
        )
    numbers = (one for one in fields(DeepseekV4Config) if one.type in ("int", "float"))
    values = read_plain(
        reader, ((one, one.default) for one in numbers if one.default is not MISSING)
    )
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
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "bos_token_id": reader.token_id("bos_token_id", vocab_size, 0),
        "eos_token_ids": reader.token_ids("eos_token_id", vocab_size, 1),
        "pad_token_id": reader.token_id("pad_token_id", vocab_size),
    }
    share = values["qk_rope_head_dim"] / values["head_dim"]
    values["main_rope"], values["compress_rope"] = _read_ropes(
        reader, values["max_position_embeddings"], share
    )
    _check_consistency(reader, values)
    return values


def _read_rope_dim(reader: FieldReader, head_dim: int) -> int:
    """Rotated channels, given as their number or as a share of the head."""
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
    """Kinds of the model's own layers; what a list has past them belongs to draft layers."""
    name, allowed = "layer_types", _TYPE_OF_RATIO.values()
    listed, ratios = reader.raw(name), reader.raw("compress_ratios")
    if listed is None and ratios is not None:
        name = "compress_ratios"
        own = [as_integer(one) for one in ratios] if isinstance(ratios, (list, tuple)) else [None]
        if None in own:
            raise reader.error(name, ratios, "a list of one integer a layer")
        if odd := [ratio for ratio in own[:num_layers] if ratio not in _TYPE_OF_RATIO]:
            raise reader.error(
                name, odd[0], "0, 4 or 128", "other ratios are layer_types with compress_rates"
            )
        listed = [_TYPE_OF_RATIO[ratio] for ratio in own[:num_layers] if ratio is not None]
    if listed is None:
        raise reader.error(
            name, None, "layer_types or compress_ratios", "no default fits every model; copy them"
        )
    if not isinstance(listed, (list, tuple)) or len(listed) < num_layers:
        raise reader.error(name, reader.raw(name), f"a list of at least {num_layers}, one a layer")
    for index, kind in enumerate(listed):
        if kind not in allowed:
            raise reader.error(f"{name}[{index}]", kind, ", ".join(map(repr, allowed)))
    return tuple(listed[:num_layers])


def _read_rates(reader: FieldReader) -> dict[str, int]:
    """Tokens per entry, by kind of layer."""
    section = reader.section("compress_rates")
    rates = {}
    for kind, default in _RATES.items():
        old = reader.integer(_OLD_RATES[kind], default)
        rates[kind] = old if section is None else section.integer(kind, old)
    if rates[CSA] >= rates[HCA]:
        raise reader.error("compress_rates", rates, f"a higher rate of {HCA} than of {CSA}")
    return rates


def _read_mlp_types(reader: FieldReader, num_layers: int) -> tuple[str, ...]:
    """Whether token ids or scores choose the experts of each layer."""
    num_hash = min(reader.integer("num_hash_layers", 3, minimum=0), num_layers)
    # draft layers are not loaded
    spare = spare_layers(reader)
    listed = reader.strings("mlp_layer_types", ("hash_moe", "moe"), num_layers, spare)
    return listed or ("hash_moe",) * num_hash + ("moe",) * (num_layers - num_hash)


def _read_ropes(reader: FieldReader, longest: int, share: float) -> tuple[RopeConfig, RopeConfig]:
    """Angles of window-only layers and of the others; `share` of a head is rotated.

    Transformers writes one section for each; released checkpoints have one `rope_scaling`, which
    counts for the layers with entries alone.
    """
    thetas = reader.positive("rope_theta", 1e4), reader.positive("compress_rope_theta", 1.6e5)
    names = "rope_parameters", "rope_scaling"
    sections = [one for name in names if (one := reader.section(name)) is not None]
    factor = reader.raw("partial_rotary_factor")
    share = share if factor is None else factor
    forms = [_read_form(one, thetas, longest, share) for one in sections]
    if len(forms) == 2 and forms[0] != forms[1]:
        raise reader.error(names[1], forms[1], f"the same as {names[0]}, {forms[0]}", "remove one")
    return forms[0] if forms else (RopeConfig(theta=thetas[0]), RopeConfig(theta=thetas[1]))


def _read_form(
    section: FieldReader, thetas: tuple[float, float], longest: int, share: float
) -> tuple[RopeConfig, RopeConfig]:
    """Both angles of one object, whose fields may be in a `main` and a `compress`."""
    nested = section.section("main"), section.section("compress")
    if nested[0] is None or nested[1] is None:
        section.raw("rope_theta")
        return RopeConfig(theta=thetas[0]), _read_rope(section, thetas[1], longest)
    for name in (*ROPE_FIELDS, "rope_theta", "partial_rotary_factor"):
        # transformers drops them
        section.raw(name)
    nested[0].choice("rope_type", "default", ("default",))
    for one in nested:
        one.choice("partial_rotary_factor", share, (share,), "as at the top of the file")
    # with neither, transformers scales cos and sin, which no V4 model is trained for
    if nested[1].raw("rope_type") == "yarn" and nested[1].raw("attention_factor") is None:
        raise nested[1].error("attention_factor", None, "1.0")
    main, compress = (
        one.positive("rope_theta", theta) for one, theta in zip(nested, thetas, strict=True)
    )
    return _read_rope(nested[0], main, longest), _read_rope(nested[1], compress, longest)


def _read_rope(section: FieldReader, theta: float, longest: int) -> RopeConfig:
    """Plain angles or YaRN's; cos and sin are never scaled."""
    for name in ("mscale", "mscale_all_dim", "partial_rotary_factor"):
        # without effect where the factor of cos and sin is 1
        section.raw(name)
    section.choice("attention_factor", 1.0, (1.0, 1, None), "V4 scales neither cos nor sin")
    original = section.raw("original_max_position_embeddings")
    if original is not None:
        original = section.integer("original_max_position_embeddings", None)
    return read_section(section, theta, original or longest, has_factor=True)


def _check_consistency(reader: FieldReader, values: dict[str, Any]) -> None:
    heads, groups = values["num_attention_heads"], values["o_groups"]
    experts, layers = values["n_routed_experts"], values["num_hidden_layers"]
    if heads % groups:
        raise reader.error("o_groups", groups, f"a divisor of num_attention_heads, {heads}")
    if values["index_head_dim"] < values["qk_rope_head_dim"]:
        allowed = f"at least the rotated channels, {values['qk_rope_head_dim']}"
        raise reader.error("index_head_dim", values["index_head_dim"], allowed)
    if experts * layers > MOST_EXPERTS:
        most = MOST_EXPERTS // layers
        raise reader.error("n_routed_experts", experts, f"at most {most} in {layers} layers")
    if values["num_experts_per_tok"] > experts:
        allowed = f"at most n_routed_experts, {experts}"
        raise reader.error("num_experts_per_tok", values["num_experts_per_tok"], allowed)
