"""Configuration fields that every family of models has, and their reading."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from typing_extensions import Self

from fd_dsa.errors import flag_error
from fd_dsa.models.config_reader import FieldReader
from fd_dsa.models.defaults import FamilyDefaults
from fd_dsa.models.packing import Packing

# many times the sizes of any model, because lists of layers and experts, tables of positions and
# buffers of selections are allocated before a weight is read
_MAX_SIZES = {
    "num_hidden_layers": 1024,
    "max_position_embeddings": 1 << 24,
    "vocab_size": 1 << 24,
    "index_topk": 1 << 16,
}
_MAX_WIDTH = 1 << 20
# of all layers together
_MAX_MODEL_EXPERTS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class FamilyFields(FamilyDefaults):
    """Fields of a model of any family.

    A field of config.json overrides the family's default. The names are those of Hugging Face's
    config.json (transformers 5.23).

    Attributes:
        mlp_layer_types: kind of MLP of each layer, in the words of the family.
        eos_token_ids: end-of-text tokens of config.json, then those of generation_config.json.
        weight_block_size: rows and columns of a block with one float32 scale in FP8 weights (e4m3,
            stored [out, in]); None = no FP8 weights.
        packing: layout of the matrices in four bits; None = there are none. The FP4 experts of
            DeepSeek-V4 are not packed.
        round_scales: scales of FP8 activations are powers of two (`scale_fmt` ue8m0).
        num_nextn_predict_layers: layers for multi-token prediction (MTP) after the last one.
        mtp: tables that the loaded MTP layer has in addition to the model's; None = no MTP layer
            is loaded. A loaded layer has an entry in the lists of layers.
        ranks: processes that share the model. The fields of `split_names` are those of one rank.
        generation: defaults of requests in generation_config.json. `do_sample` false is a
            temperature of 0, `max_new_tokens` is `max_tokens`.
        unknown_fields: fields of config.json that are ignored although they may change results.
        split_names: fields of heads and widths that ranks divide.
    """

    split_names: ClassVar[tuple[str, ...]]

    tie_word_embeddings: bool
    mlp_layer_types: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    weight_block_size: tuple[int, int] | None = None
    packing: Packing | None = None
    round_scales: bool = False
    num_nextn_predict_layers: int = 0
    mtp: tuple[str, ...] | None = None
    ranks: int = 1
    generation: Mapping[str, float] = field(default_factory=dict)
    unknown_fields: tuple[str, ...] = field(default=(), compare=False)

    def split(self, size: int) -> Self:
        """Return the part of one of `size` ranks.

        Raises:
            ConfigError: a field of `split_names` is no multiple of `size`.
        """
        if size == 1:
            return self
        parts: dict[str, Any] = {}
        for name in self.split_names:
            width = getattr(self, name)
            if width % size:
                allowed = f"a divisor of the model's {name}, {width}"
                raise flag_error("tensor_parallel_size", size, allowed, "take another one")
            parts[name] = width // size
        return replace(self, ranks=size, **parts)

    @property
    def head_rows(self) -> int:
        """Rows of the head that a rank computes.

        The whole vocabulary if the head is the embedding, or if ranks do not divide it.
        """
        if self.tie_word_embeddings or self.vocab_size % self.ranks:
            return self.vocab_size
        return self.vocab_size // self.ranks


def read_numbers(
    reader: FieldReader, defaults: FamilyDefaults, apart: Collection[str] = ()
) -> dict[str, Any]:
    """Return the defaults, with the numbers and booleans that a file has instead.

    Args:
        apart: defaults that the caller reads, or that are no field of config.json.
    """
    values: dict[str, Any] = {}
    for one in fields(defaults):
        name = one.name
        values[name] = default = getattr(defaults, name)
        if name in apart:
            continue
        if one.type == "int":
            values[name] = reader.integer(name, default, maximum=_MAX_SIZES.get(name, _MAX_WIDTH))
        elif one.type == "float":
            values[name] = reader.positive(name, default)
        elif one.type == "bool":
            values[name] = reader.boolean(name, default)
    return values


def read_tokens(reader: FieldReader, vocab_size: int) -> dict[str, Any]:
    """Read special tokens, the kind of head, and the number of MTP layers."""
    # nothing reads them, because the tokenizer has its own
    for name in ("bos_token_id", "pad_token_id"):
        reader.check_token_id(name, vocab_size)
    return {
        "num_nextn_predict_layers": _num_mtp_layers(reader),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "eos_token_ids": reader.token_ids("eos_token_id", vocab_size, 1),
    }


def _num_mtp_layers(reader: FieldReader) -> int:
    """Read the number of MTP layers."""
    return reader.integer("num_nextn_predict_layers", 0, minimum=0)


def spare_layers(reader: FieldReader) -> int:
    """Return the number of entries that lists of layers may have for MTP layers."""
    return max(_num_mtp_layers(reader), 1)


def check_num_experts(reader: FieldReader, values: Mapping[str, Any]) -> None:
    """Refuse more experts of all layers together than lists of them may have."""
    experts, layers = values["n_routed_experts"], values["num_hidden_layers"]
    if experts * layers > _MAX_MODEL_EXPERTS:
        limit = _MAX_MODEL_EXPERTS // layers
        raise reader.error("n_routed_experts", experts, f"at most {limit} in {layers} layers")


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
