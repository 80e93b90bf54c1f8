"""The double's model: FastDeploy's names and its loader."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import paddle
import pytest

from fd_dsa.config import demo_model_path
from tests.fakes.trees import DEVELOP, installed

LAYER = "model.layers.1."
NAMES = {
    "model.embed_tokens.embeddings.weight",
    "lm_head.linear.weight",
    "model.norm.weight",
    f"{LAYER}input_layernorm.weight",
    f"{LAYER}self_attn.qkv_a_proj_with_mqa.weight",
    f"{LAYER}self_attn.q_a_layernorm.weight",
    f"{LAYER}self_attn.kv_b_proj.weight",
    f"{LAYER}self_attn.kv_b_proj_bmm.k_b_proj_weight",
    f"{LAYER}self_attn.indexer.wq_b.weight",
    f"{LAYER}self_attn.indexer.k_norm.bias",
    f"{LAYER}self_attn.indexer.weights_proj.weight",
    f"{LAYER}mlp.gate.weight",
    f"{LAYER}mlp.experts.gate_correction_bias",
    f"{LAYER}mlp.experts.up_gate_proj_weight",
    f"{LAYER}mlp.shared_experts.up_gate_proj.weight",
    "model.layers.0.mlp.up_gate_proj.weight",
}


def test_parameters_have_upstream_s_names_are_all_filled_and_go_with_the_model() -> None:
    """Sessions make hundreds of models; the garbage collector does not see what parameters keep."""
    with installed(DEVELOP):
        from fastdeploy.config import fd_config
        from fastdeploy.model_executor.models import ModelRegistry
        from fastdeploy.model_executor.models.deepseek_weights import UnknownWeight
        from fastdeploy.worker.checkpoint import read_checkpoint

        paddle.set_default_dtype("float32")
        config = fd_config(demo_model_path(), num_hidden_layers=2)
        model = ModelRegistry.get_class(config.model_config.architectures[0])(config)
        model.load_weights(read_checkpoint(demo_model_path()))
        parameters = dict(model.named_parameters())
        assert set(parameters) >= NAMES
        assert [n for n, parameter in parameters.items() if not np.any(parameter.numpy())] == []
        with pytest.raises(UnknownWeight, match="q_c_proj"):
            model.load_weights([("model.layers.0.self_attn.q_c_proj.weight", np.ones(3))])
        layers = [weakref.ref(layer) for layer in model.sublayers()]
        del model, parameters
        gc.collect()
        assert len(layers) > 20
        assert [layer() for layer in layers if layer() is not None] == []
