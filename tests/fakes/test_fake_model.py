"""The double's model: FastDeploy's names, its loader, its ranks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

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


def make_model(**overrides: Any) -> Any:
    from fastdeploy.config import fd_config
    from fastdeploy.model_executor.models import ModelRegistry
    from fastdeploy.worker.checkpoint import read_checkpoint

    paddle.set_default_dtype("float32")
    config = fd_config(demo_model_path(), num_hidden_layers=2, **overrides)
    model = ModelRegistry.get_class(config.model_config.architectures[0])(config)
    model.load_weights(read_checkpoint(demo_model_path()))
    return model


def test_parameters_have_upstream_s_names_and_are_all_filled() -> None:
    with installed(DEVELOP):
        parameters = dict(make_model().named_parameters())
    assert set(parameters) >= NAMES
    empty = [n for n, parameter in parameters.items() if not np.any(parameter.numpy())]
    assert empty == []


def test_an_unknown_tensor_is_an_error() -> None:
    with installed(DEVELOP):
        from fastdeploy.model_executor.models.deepseek_weights import UnknownWeight

        with pytest.raises(UnknownWeight, match="q_c_proj"):
            make_model().load_weights([("model.layers.0.self_attn.q_c_proj.weight", np.ones(3))])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_heads_and_add_up(ranks: int) -> None:
    """Projections of an attention layer: each rank's heads, whose outputs sum to the whole."""
    rng = np.random.default_rng(0)
    with installed(DEVELOP):
        whole = make_model().model.layers[1].self_attn
        shares = [
            make_model(tensor_parallel_size=ranks, tensor_parallel_rank=rank)
            .model.layers[1]
            .self_attn
            for rank in range(ranks)
        ]
        qr = paddle.to_tensor(rng.standard_normal((3, 128)).astype(np.float32))
        latent = paddle.to_tensor(rng.standard_normal((8, 3, 512)).astype(np.float32))

        def output(layer: Any, heads: slice) -> np.ndarray:
            values = layer.kv_b_proj_bmm(latent[heads], proj_type="v").transpose([1, 0, 2])
            return layer.o_proj(values.reshape([3, -1])).numpy()

        width = 8 // ranks
        parts = [output(one, slice(r * width, (r + 1) * width)) for r, one in enumerate(shares)]
        np.testing.assert_allclose(sum(parts), output(whole, slice(None)), rtol=1e-4, atol=1e-5)
        queries = np.concatenate([one.q_b_proj(qr).numpy() for one in shares], axis=1)
        np.testing.assert_allclose(queries, whole.q_b_proj(qr).numpy(), rtol=1e-5, atol=1e-6)


def test_a_model_goes_when_nobody_holds_it() -> None:
    """Sessions make hundreds; what a parameter keeps is hidden from the garbage collector."""
    with installed(DEVELOP):
        model = make_model()
        layers = [weakref.ref(layer) for layer in model.sublayers()]
        del model
        gc.collect()
        assert len(layers) > 20
        assert [layer() for layer in layers if layer() is not None] == []
