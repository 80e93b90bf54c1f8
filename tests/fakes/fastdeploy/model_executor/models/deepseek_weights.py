"""How checkpoint names become FastDeploy's parameters (`models/deepseek_v3.py`, load_weights)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fastdeploy.model_executor.layers.utils import default_weight_loader

# (part of the parameter's name, part of the checkpoint's name, shard)
_STACKED = (
    ("up_gate_proj", "gate_proj", "gate"),
    ("up_gate_proj", "up_proj", "up"),
    ("embed_tokens.embeddings", "embed_tokens", None),
    ("lm_head.linear", "lm_head", None),
    ("experts.gate_correction_bias", "gate.e_score_correction_bias", None),
    ("qkv_a_proj_with_mqa", "q_a_proj", "q_a"),
    ("qkv_a_proj_with_mqa", "kv_a_proj_with_mqa", "kv_a"),
)
_EXPERT = re.compile(
    r"(?P<layer>.*\.mlp\.experts)\.(?P<id>\d+)\.(?P<part>gate|up|down)_proj\.weight"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class UnknownWeight(KeyError):
    """A checkpoint tensor for which the model has no parameter."""


def load_into(model: Any, weights: Iterable[tuple[str, np.ndarray]]) -> None:
    """Fill the parameters of a model by name.

    Args:
        weights: names and float32 arrays of a checkpoint in Hugging Face format.

    Raises:
        UnknownWeight: a tensor has no parameter. Upstream skips any such, which would hide a wrong
            name in a test; here only those of layers past the model's go.
    """
    parameters = dict(model.named_parameters())
    found = filter(None, map(_LAYER.match, parameters))
    last_layer = max((int(match[1]) for match in found), default=-1)
    for name, array in weights:
        layer = _LAYER.match(name)
        if layer and int(layer[1]) > last_layer:
            continue
        expert = _EXPERT.fullmatch(name)
        if expert:
            _load_expert(parameters, expert, array)
            continue
        for param_name, shard_id in _candidates(name):
            if param_name in parameters:
                parameter = parameters[param_name]
                loader = getattr(parameter, "weight_loader", default_weight_loader)
                loader(parameter, array, shard_id)
                break
        else:
            raise UnknownWeight(name)
    for layer in model.sublayers():
        if hasattr(layer, "process_weights_after_loading"):
            layer.process_weights_after_loading()


def _candidates(name: str) -> Iterator[tuple[str, str | None]]:
    """Parameters that a tensor may belong to, stacked ones first."""
    for param, part, shard_id in _STACKED:
        if part in name:
            yield name.replace(part, param), shard_id
    yield name, None


def _load_expert(parameters: dict[str, Any], expert: re.Match[str], array: np.ndarray) -> None:
    """Hand one expert's projection to the stacked parameter."""
    stack = "down_proj_weight" if expert["part"] == "down" else "up_gate_proj_weight"
    parameter = parameters[f"{expert['layer']}.{stack}"]
    parameter.weight_loader(parameter, array, shard_id=expert["part"], expert_id=int(expert["id"]))
