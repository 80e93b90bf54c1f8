"""What the preparation of a step needs to know about a DeepSeek-V4 model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fd_dsa.models.config_reader import FieldReader, read_json_object

# an object with the fields as attributes, a mapping of them, or a path
ModelSource = Any

_NAMES = (
    "compress_ratios",
    "sliding_window",
    "index_topk",
    "max_position_embeddings",
    "num_hidden_layers",
    "num_nextn_predict_layers",
)


class ModelFields(NamedTuple):
    """Window, ratios and top-k of a model."""

    sliding_window: int
    csa_ratio: int
    hca_ratio: int
    index_topk: int


def read_model_fields(source: ModelSource, max_model_len: int) -> ModelFields:
    """Window, ratios and top-k from a model's configuration, checked.

    Raises:
        ConfigError: names the field, its value, the rule and the cure.

    Source: the configs of DeepSeek-V4-Flash and -Pro; Hugging Face transformers,
    models/deepseek_v4 (a ratio of 0 = window only, the lower ratio = CSA, the higher = HCA).
    """
    reader = _reader(source)
    csa_ratio, hca_ratio = _read_ratios(reader)
    if reader.raw("max_position_embeddings") is not None:
        longest = reader.integer("max_position_embeddings", None)
        if max_model_len > longest:
            raise reader.error(
                "max_position_embeddings",
                longest,
                f"at least max_model_len = {max_model_len}",
                "lower max_model_len",
            )
    return ModelFields(
        reader.integer("sliding_window", None),
        csa_ratio,
        hca_ratio,
        reader.integer("index_topk", None),
    )


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


def _read_ratios(reader: FieldReader) -> tuple[int, int]:
    """The two ratios of the layers."""
    name = "compress_ratios"
    ratios = reader.raw(name)
    if not isinstance(ratios, (list, tuple)) or not all(
        type(ratio) is int and ratio >= 0 for ratio in ratios
    ):
        raise reader.error(
            name,
            ratios,
            "a list of one ratio a layer, 0 for a window-only layer",
            "take it from the checkpoint's config.json; no default fits every model",
        )
    used = sorted(set(ratios) - {0})
    if len(used) != 2:
        raise reader.error(
            name,
            list(ratios),
            f"two ratios other than 0, CSA's and HCA's; found {used}",
            "for other layer mixes construct V4PrepareConfig with csa_ratio and hca_ratio",
        )
    if reader.raw("num_hidden_layers") is not None:
        layers = reader.integer("num_hidden_layers", None)
        drafts = 0
        if reader.raw("num_nextn_predict_layers") is not None:
            drafts = reader.integer("num_nextn_predict_layers", None, minimum=0)
        if not layers <= len(ratios) <= layers + drafts:
            raise reader.error(
                name,
                list(ratios),
                f"one ratio for each of num_hidden_layers = {layers} layers, and at most "
                f"num_nextn_predict_layers = {drafts} more",
                "one of the three fields is wrong",
            )
    return used[0], used[1]
