"""What the preparation of a step needs to know about a DeepSeek-V4 model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fd_dsa.models.config_reader import FieldReader, read_json_object

# an object with the fields as attributes, a mapping of them, or a path
ModelSource = Any

_WINDOW_ONLY = "sliding_attention"
_KINDS = ("compressed_sparse_attention", "heavily_compressed_attention")
_NAMES = (
    "layer_types",
    "compress_rates",
    "compress_ratios",
    "sliding_window",
    "index_topk",
    "max_position_embeddings",
    "num_hidden_layers",
)
# CSA's and HCA's, where a model has layers of one kind or of none
_RELEASED = (4, 128)


def read_model_fields(source: ModelSource, max_model_len: int) -> dict[str, int]:
    """Window, ratios and top-k from a model's configuration, checked, by `V4PrepareConfig` field.

    Raises:
        ConfigError: names the field, its value, the rule and the cure.

    Source: the configs of DeepSeek-V4-Flash and -Pro; Hugging Face transformers,
    models/deepseek_v4.
    """
    reader = _reader(source)
    has_types = reader.raw("layer_types") is not None
    csa_ratio, hca_ratio = _ratios_by_type(reader) if has_types else _ratios_by_layer(reader)
    if reader.raw("max_position_embeddings") is not None:
        longest = reader.integer("max_position_embeddings", None)
        if max_model_len > longest:
            allowed = f"at least max_model_len = {max_model_len}"
            raise reader.error("max_position_embeddings", longest, allowed, "lower max_model_len")
    return {
        "window_size": reader.integer("sliding_window", None),
        "csa_ratio": csa_ratio,
        "hca_ratio": hca_ratio,
        "index_topk": reader.integer("index_topk", None),
    }


def _reader(source: ModelSource) -> FieldReader:
    """A reader over a path, a mapping or an object."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        return FieldReader(read_json_object(path), str(path))
    if isinstance(source, Mapping):
        return FieldReader(dict(source), "hf_config")
    present = {name: getattr(source, name) for name in _NAMES if hasattr(source, name)}
    return FieldReader(present, type(source).__name__)


def _own_layers(reader: FieldReader, name: str, values: Any) -> list[Any]:
    """The entries of the model's own layers, without those of draft layers."""
    num_layers = len(values)
    if reader.raw("num_hidden_layers") is not None:
        num_layers = reader.integer("num_hidden_layers", None)
    if len(values) < num_layers:
        allowed = f"an entry for each of num_hidden_layers = {num_layers} layers, and more for "
        raise reader.error(name, values, f"{allowed}drafts", "one of the two fields is wrong")
    return list(values)[:num_layers]


def _ratios_by_type(reader: FieldReader) -> tuple[int, ...]:
    """CSA's and HCA's ratio where layers have types, and types have rates."""
    types = reader.raw("layer_types")
    if not isinstance(types, (list, tuple)) or any(
        kind not in (_WINDOW_ONLY, *_KINDS) for kind in types
    ):
        allowed = f"a list of {_WINDOW_ONLY!r}, {_KINDS[0]!r} or {_KINDS[1]!r} for each layer"
        raise reader.error("layer_types", types, allowed)
    _own_layers(reader, "layer_types", types)
    rates = reader.section("compress_rates") or FieldReader({}, reader.source)
    pairs = zip(_KINDS, _RELEASED, strict=True)
    return tuple(rates.integer(kind, released) for kind, released in pairs)


def _ratios_by_layer(reader: FieldReader) -> tuple[int, ...]:
    """CSA's and HCA's ratio where each layer has its ratio."""
    name = "compress_ratios"
    ratios = reader.raw(name)
    if not isinstance(ratios, (list, tuple)) or not all(
        type(ratio) is int and ratio >= 0 for ratio in ratios
    ):
        allowed = "a list of one ratio a layer, 0 for a window-only layer"
        cure = "take it, or layer_types, from the checkpoint's config.json; no default fits every "
        raise reader.error(name, ratios, allowed, f"{cure}model")
    used = tuple(sorted({*_own_layers(reader, name, ratios)} - {0}))
    if {*used} <= {*_RELEASED}:
        return _RELEASED
    if len(used) != 2:
        allowed = "two ratios other than 0, CSA's and HCA's, or some of 0, 4 and 128; found "
        cure = "for other layer mixes construct V4PrepareConfig with csa_ratio and hca_ratio"
        raise reader.error(name, list(ratios), f"{allowed}{list(used)}", cure)
    return used
