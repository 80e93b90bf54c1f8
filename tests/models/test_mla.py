"""One attention layer against its definition: keys and values of every head, key by key.

The reference follows the checkpoint's tensors, never the absorbed form. A case counts only if its
selection is decided, and if the other RoPE pairing would select other keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.mla import DeepseekV32DSAAttention
from fd_dsa.models.rope import inverse_frequencies
from fd_dsa.ops.arrays import rows_at
from tests.reference.indexer import ref_layer_norm, ref_rms_norm, ref_score
from tests.reference.rope import ref_rotate
from tests.reference.sparse_mla import ref_expanded
from tests.reference.topk import ref_topk
from tests.runner.tiny import GLM, V32, random_tensors, tiny_model, tiny_runner

NUM_TOKENS = 30
PREFIX = "model.layers.0.self_attn."
YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SIZES = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "indexer_types": ["full"],
    "hidden_size": 40,
    "qk_rope_head_dim": 8,
    "index_head_dim": 16,
    "index_topk": 9,
    "index_n_heads": 16,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
CASES = {
    "v32": {k: v for k, v in (V32 | SIZES).items() if k != "indexer_types"},
    "v32-yarn": {
        k: v for k, v in (V32 | SIZES | {"rope_scaling": YARN}).items() if k != "indexer_types"
    },
    "glm": GLM | SIZES,
    "glm-bias": GLM | SIZES | {"attention_bias": True, "rms_norm_eps": 1e-2},
}


@dataclass(frozen=True)
class Reference:
    """One layer in doubles, from the tensors of a checkpoint.

    `interleaved` is the pairing of the indexer's RoPE; that of attention is always interleaved.
    """

    config: ModelConfig
    weights: dict[str, np.ndarray]
    interleaved: bool

    def project(self, name: str, x: np.ndarray) -> np.ndarray:
        """weight . x + bias, where the layer has one."""
        bias = self.weights.get(f"{name}.bias", 0.0)
        return self.weights[f"{name}.weight"].astype(np.float64) @ x + bias

    def token(self, x: np.ndarray, position: int) -> dict[str, Any]:
        """Everything of one token that attention and indexer need."""
        c, w = self.config, self.weights
        angles = position * inverse_frequencies(c.rope, c.qk_rope_head_dim).astype(np.float64)
        rope, nope = c.qk_rope_head_dim, c.qk_nope_head_dim
        norm = w["q_a_layernorm.weight"]
        qr = ref_rms_norm(self.project("q_a_proj", x), norm, c.rms_norm_eps)
        q = self.project("q_b_proj", qr).reshape(c.num_attention_heads, -1)
        kv = self.project("kv_a_proj_with_mqa", x)
        index_q = self.project("indexer.wq_b", qr).reshape(c.index_n_heads, -1)
        k_norm = (w["indexer.k_norm.weight"], w["indexer.k_norm.bias"], 1e-6)
        index_k = ref_layer_norm(self.project("indexer.wk", x), *k_norm)
        for head in [*index_q, index_k]:
            head[:rope] = ref_rotate(head[:rope], angles, self.interleaved)
        scale = c.index_n_heads**-0.5 * c.index_head_dim**-0.5
        return {
            "q_nope": q[:, :nope],
            "q_pe": np.array([ref_rotate(head, angles, True) for head in q[:, nope:]]),
            "latent": ref_rms_norm(
                kv[: c.kv_lora_rank], w["kv_a_layernorm.weight"], c.rms_norm_eps
            ),
            "k_pe": ref_rotate(kv[c.kv_lora_rank :], angles, True),
            "index_q": index_q,
            "index_k": index_k,
            "index_weights": scale * self.project("indexer.weights_proj", x),
        }

    def forward(self, x: np.ndarray) -> tuple[list[list[int]], np.ndarray, float]:
        """Selected positions, outputs, and the smallest gap at the edge of a selection."""
        c = self.config
        tokens = [self.token(row, position) for position, row in enumerate(x.astype(np.float64))]
        selected, outputs, gaps = [], [], [np.inf]
        for position, token in enumerate(tokens):
            seen = tokens[: position + 1]
            q, weights = token["index_q"], token["index_weights"]
            scores = [ref_score(q, weights, key["index_k"]) for key in seen]
            ranked = sorted(scores, reverse=True)
            if len(scores) > c.index_topk:
                gap = ranked[c.index_topk - 1] - ranked[c.index_topk]
                gaps.append(gap / max(map(abs, scores)))
            chosen = [p for p in ref_topk(scores, len(scores), c.index_topk) if p >= 0]
            heads = ref_expanded(
                token["q_nope"],
                token["q_pe"],
                [tokens[p]["latent"] for p in chosen],
                [tokens[p]["k_pe"] for p in chosen],
                self.weights["kv_b_proj.weight"],
                c.softmax_scale,
                c.v_head_dim,
            )
            selected.append(chosen)
            outputs.append(self.project("o_proj", heads.ravel()))
        return selected, np.array(outputs), min(gaps)


def layer_and_reference(
    name: str, seed: int
) -> tuple[DeepseekV32DSAAttention, Any, Reference, np.ndarray]:
    """The layer with its runner, its reference, and hidden states of `NUM_TOKENS` tokens."""
    model = tiny_model(CASES[name], seed)
    config = model.config
    tensors = random_tensors(config, seed)
    weights = {
        key.removeprefix(PREFIX): array for key, array in tensors.items() if key.startswith(PREFIX)
    }
    reference = Reference(config, weights, config.model_type == "glm_moe_dsa")
    rng = np.random.default_rng([seed, 1])
    x = rng.standard_normal((NUM_TOKENS, config.hidden_size)).astype(np.float32)
    return model.layers[0].self_attn, tiny_runner(model), reference, x


def run_layer(layer: Any, runner: Any, x: np.ndarray, start: int = 0) -> tuple[np.ndarray, Any]:
    """Outputs and slots of hidden states from position `start` on, row 0."""
    runner.input_batch.begin_step()
    runner.input_batch.add_row(0, [2] * len(x), start, True)
    runner.initialize_forward_meta()
    meta = runner.forward_meta
    out, slots = layer.forward(x, rows_at(runner.model.cos_sin, meta.position_ids), meta, None)
    return out, slots.numpy()


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_its_definition(name: str) -> None:
    layer, runner, reference, x = layer_and_reference(name, seed=3)
    selected, wanted, gap = reference.forward(x)
    assert gap > 1e-5
    out, slots = run_layer(layer, runner, x)
    table = runner.input_batch.block_tables[0]
    place = {int(table[p // 16]) * 16 + p % 16: p for p in range(NUM_TOKENS)}
    found = [[place[s] for s in row if s >= 0] for row in slots.tolist()]
    assert found == selected
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max() + 1e-6)
    # the same in two chunks
    again = [run_layer(layer, runner, x[:13])[0], run_layer(layer, runner, x[13:], 13)[0]]
    np.testing.assert_allclose(np.concatenate(again), out, rtol=0, atol=1e-5)
