"""Folders written by transformers are read to the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.loader import load_weights, validate
from fd_dsa.models.registry import read_config
from fd_dsa.models.sources import WeightLoader
from tests.models.folders import TINY, TINY_GLM

CASES = {
    "v32 float32": (TINY, "float32", "50GB"),
    "v32 bfloat16 sharded": (TINY, "bfloat16", "20KB"),
    "glm float16 shared indexers": (TINY_GLM, "float16", "50GB"),
    "glm tied": (TINY_GLM | {"tie_word_embeddings": True}, "float32", "50GB"),
}


def _state(model: Any) -> dict[str, np.ndarray]:
    """Tensors of a transformers model as float32, its stacked experts one by one."""
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name] = values
            continue
        prefix, part = name.rsplit(".", 1)
        for expert, matrix in enumerate(values):
            if part == "down_proj":
                tensors[f"{prefix}.{expert}.down_proj.weight"] = matrix
                continue
            gate, up = np.split(matrix, 2)
            tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
            tensors[f"{prefix}.{expert}.up_proj.weight"] = up
    return tensors


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES)
def test_folder_written_by_transformers(tmp_path: Path, case: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields, dtype, shard_size = CASES[case]
    torch.manual_seed(0)
    hf_config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    expected = _state(model)

    config = read_config(tmp_path)
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    loaded: dict[str, np.ndarray] = {}

    def loader(name: str) -> WeightLoader:
        return lambda source: loaded.__setitem__(name, source.float32().copy())

    with Checkpoint.open(tmp_path) as checkpoint:
        assert len({checkpoint.info(name).file for name in checkpoint.names()}) > 1 or (
            shard_size == "50GB"
        )
        validate(checkpoint, config)
        names = expected_tensors(config)
        load_weights(checkpoint, config, {name: loader(name) for name in names})
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(loaded[name], values, err_msg=name)
