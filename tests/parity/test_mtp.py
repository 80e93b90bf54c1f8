"""The layer for multi-token prediction against a torch layer made of transformers' decoder layer.

transformers skips the layer's tensors, so a model of one layer is made of them, whose input is
what enorm, hnorm and eh_proj give.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.loader import load_weights, validate
from fd_dsa.models.registry import config_from_dict, create_model
from fd_dsa.models.weights import HostWeights
from fd_dsa.runner import InputBatch, ModelRunner
from tests.models.drawn import in_drawn_order
from tests.parity.cases import CASES, random_weight
from tests.runner.dsa import dsa_runner

pytestmark = pytest.mark.oracle
LENGTH, TOLERANCE = 130, 1e-4
# of a tensor of the checkpoint -> of the model of one layer
_RENAMED = {"shared_head.norm.weight": "model.norm.weight"}


def our_runner(folder: Path, config: ModelConfig) -> ModelRunner:
    """Our side of the checkpoint."""
    weights = HostWeights()
    model = create_model(config, weights)
    with Checkpoint.open(folder) as checkpoint:
        validate(checkpoint, config)
        load_weights(checkpoint, config, weights.loaders)
    runner = dsa_runner(model, InputBatch(1, 64, 16, 16), config.cache_layout("float32", 16), 16)
    runner.input_batch.set_blocks(0, range(16))
    return runner


def torch_side(
    fields: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path
) -> tuple[Any, Any]:
    """transformers' model of the layer alone, and the layer's own tensors in torch."""
    import torch
    from safetensors.numpy import save_file
    from transformers import DeepseekV32ForCausalLM, GlmMoeDsaForCausalLM

    from tests.parity.hugging_face import give_latents_the_model_eps

    prefix = f"model.layers.{fields['num_hidden_layers']}."
    own = {name.removeprefix(prefix): one for name, one in tensors.items() if prefix in name}
    kept = {"lm_head.weight", "model.embed_tokens.weight"}
    alone = {name: one for name, one in tensors.items() if name in kept}
    for name, one in own.items():
        alone[_RENAMED.get(name, f"model.layers.0.{name}")] = one
    parts = {f"model.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")}
    folder.mkdir()
    one_layer = fields | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    one_layer |= {"indexer_types": ["full"]} if "indexer_types" in fields else {}
    (folder / "config.json").write_text(json.dumps(one_layer))
    saved = {name: one for name, one in alone.items() if name not in parts}
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    classes = {"deepseek_v32": DeepseekV32ForCausalLM, "glm_moe_dsa": GlmMoeDsaForCausalLM}
    model = classes[fields["model_type"]].from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    give_latents_the_model_eps(model)
    return model.eval(), {name: torch.tensor(one) for name, one in own.items()}


@pytest.mark.parametrize("name", ["v32", "v32-yarn-groups", "glm"])
def test_logits_equal_those_of_transformers_decoder_layer(tmp_path: Path, name: str) -> None:
    import torch
    from safetensors.numpy import save_file

    case = CASES[name]
    fields = case.config | {"num_nextn_predict_layers": 1}
    config = config_from_dict(fields).with_mtp_layer()
    draw = np.random.default_rng(5)
    tensors = {
        key: random_weight(draw, key, one.shape)
        for key, one in in_drawn_order(expected_tensors(config)).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    runner, ids = our_runner(tmp_path, config), case.prompt(LENGTH)
    found, hidden = [], []
    for begin in range(0, LENGTH - 1, 64):
        chunk = ids[begin : min(begin + 64, LENGTH - 1)]
        runner.input_batch.begin_step()
        runner.input_batch.add_row(0, chunk, begin, is_prefill=True)
        runner.execute_model(np.array([0]))
        hidden.append(runner.forward_meta.hidden_states.copy())
        next_ids = np.array(ids[begin + 1 : begin + 1 + len(chunk)])
        found.append(runner.predict_more(next_ids, np.arange(len(chunk))))
    model, own = torch_side(fields, tensors, tmp_path / "layer")
    with torch.no_grad():

        def norm(rows: Any, weight: Any) -> Any:
            return torch.nn.functional.rms_norm(rows, rows.shape[-1:], weight, config.rms_norm_eps)

        embedded = model.model.embed_tokens(torch.tensor(ids[1:]))
        embedded[0] = 0
        states = torch.tensor(np.concatenate(hidden))
        parts = [norm(embedded, own["enorm.weight"]), norm(states, own["hnorm.weight"])]
        joined = torch.cat(parts, -1) @ own["eh_proj.weight"].T
        wanted = model(inputs_embeds=joined[None]).logits[0].numpy()
    difference = np.abs(np.concatenate(found) - wanted).max(axis=1)
    # where rounding decides a selection one may differ
    assert np.mean(difference > TOLERANCE * np.abs(wanted).max()) < 0.03
