"""The layer for multi-token prediction against its definition, and its caches under fire."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.errors import ConfigError
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.loader import load_weights, validate
from fd_dsa.models.mtp_layer import add_mtp_layer
from fd_dsa.models.registry import config_from_dict, create_model, read_config
from fd_dsa.models.sources import MTP_EMBEDDING, MTP_HEAD
from fd_dsa.models.weights import HostWeights
from fd_dsa.startup import build
from fd_dsa.startup.memory import weight_bytes
from fd_dsa.startup.plan import make_plan
from tests.models.folders import (
    SCALE_SUFFIX,
    TINY,
    TINY_FP8,
    TINY_GLM,
    Stored,
    bf16,
    f8,
    f32,
    write_folder,
    write_safetensors,
)
from tests.models.test_mla import Reference
from tests.reference.indexer import ref_rms_norm
from tests.reference.moe import GateRule, ref_gate, ref_mlp
from tests.runner.tiny import GLM, V32, random_tensors, tiny_model, tiny_runner

IDS = np.random.default_rng(7).integers(2, 50, 31)
LAYERS: dict[str, tuple[str, ...]] = {"shared": (), "own": (MTP_EMBEDDING, MTP_HEAD)}
TOLERANCE = 2e-5


def ref_mtp(
    config: ModelConfig, tensors: dict[str, np.ndarray], next_ids: np.ndarray, hidden: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Normed hidden states and logits of tokens at positions 0 to n - 1, in doubles.

    Args:
        config: of the model.
        tensors: of the checkpoint.
        next_ids: int [n]; the token after each.
        hidden: [n, hidden_size], after the norm of the model, or of the layer for a further draft.
    """
    prefix = f"model.layers.{config.num_hidden_layers}."
    own = {key.removeprefix(prefix): one for key, one in tensors.items() if prefix in key}
    embedding = own.get("embed_tokens.weight", tensors["model.embed_tokens.weight"])
    head = own.get("shared_head.head.weight", tensors["lm_head.weight"])
    eps = config.rms_norm_eps

    def norm(rows: Any, name: str) -> np.ndarray:
        return np.array([ref_rms_norm(row, own[f"{name}.weight"], eps) for row in rows])

    embedded = embedding[next_ids].astype(np.float64)
    embedded[0] = 0
    parts = [norm(embedded, "enorm"), norm(hidden, "hnorm")]
    x = np.concatenate(parts, axis=1) @ own["eh_proj.weight"].astype(np.float64).T
    attention = {key.removeprefix("self_attn."): one for key, one in own.items()}
    reference = Reference(config, attention, config.model_type == "glm_moe_dsa")
    x = x + reference.forward(norm(x, "input_layernorm"))[1]
    x = x + [_experts(config, own, row) for row in norm(x, "post_attention_layernorm")]
    normed = norm(x, "shared_head.norm")
    return normed, normed @ head.astype(np.float64).T


def _experts(config: ModelConfig, own: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Shared and chosen experts of one token."""

    def mlp(name: str) -> np.ndarray:
        names = ("gate_proj", "up_proj", "down_proj")
        return ref_mlp(x, *(own[f"mlp.{name}.{one}.weight"] for one in names))

    scores = 1 / (1 + np.exp(-(own["mlp.gate.weight"] @ x)))
    rule = GateRule(
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    chosen = ref_gate(np.float32(scores), own["mlp.gate.e_score_correction_bias"], rule)
    routed = [weight * mlp(f"experts.{expert}") for expert, weight in chosen.items()]
    return mlp("shared_experts") + sum(routed)


class Case:
    """A model with its layer, and what the layer has to give after each of `IDS` but the last."""

    def __init__(self, fields: dict[str, Any], layer: tuple[str, ...]) -> None:
        self.model = tiny_model(fields | {"num_nextn_predict_layers": 1}, seed=4, mtp=layer)
        self.config = self.model.config
        self.tensors = random_tensors(self.config, 4)
        # the hidden states after the model's norm, by a runner of their own
        runner = tiny_runner(self.model)
        runner.input_batch.begin_step()
        runner.input_batch.add_row(0, IDS.tolist(), 0, True)
        step = runner.initialize_forward_meta()
        self.hidden = self.model(step.token_ids, step)[:-1]
        self.normed, self.logits = self.wanted(IDS[1:], self.hidden)

    def wanted(self, next_ids: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ref_mtp`."""
        return ref_mtp(self.config, self.tensors, next_ids, hidden)


@pytest.fixture(scope="module", params=["v32-shared", "v32-own", "glm-shared"])
def case(request: pytest.FixtureRequest) -> Case:
    family, layer = request.param.split("-")
    return Case(V32 if family == "v32" else GLM, LAYERS[layer])


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def run(runner: Any, row: int, begin: int, ids: list[int], next_ids: list[int]) -> np.ndarray:
    """Logits of the layer after each token of one row's step."""
    runner.input_batch.begin_step()
    runner.input_batch.add_row(row, ids, begin, is_prefill=begin == 0 or len(ids) > 4)
    runner.execute_model(np.array([len(ids) - 1]))
    return runner.predict_more(np.array(next_ids), np.arange(len(ids)))


def test_logits_equal_their_definition_in_any_chunks(case: Case) -> None:
    ids, n = IDS.tolist(), len(IDS) - 1
    for chunks in ([n], [16, 14], [13, *[1] * 17], [20, *[2] * 5]):
        runner, begin, logits = tiny_runner(case.model, poison=True), 0, []
        for size in chunks:
            end = begin + size
            logits.append(run(runner, 1, begin, ids[begin:end], ids[begin + 1 : end + 1]))
            begin = end
        assert_near(np.concatenate(logits), case.logits)


def test_rejected_drafts_leave_nothing(case: Case) -> None:
    ids = IDS.tolist()
    runner = tiny_runner(case.model, poison=True)
    run(runner, 1, 0, ids[:14], ids[1:15])
    for begin in range(14, 30, 2):
        # two tokens of each row stand, two drafts do not
        wrong = [ids[begin], ids[begin + 1], 3, 4]
        logits = run(runner, 1, begin, wrong, [ids[begin + 1], ids[begin + 2], 4, 5])
        assert_near(logits[:2], case.logits[begin : begin + 2])


def test_further_drafts_go_on_from_the_layers_own_hidden_states(case: Case) -> None:
    ids, batch_rows = IDS.tolist(), (0, 2)
    runner = tiny_runner(case.model, poison=True)
    batch = runner.input_batch
    batch.begin_step()
    for row in batch_rows:
        batch.add_row(row, ids[:20], 0, True)
    runner.execute_model(np.array([19, 39]))
    logits = runner.predict_more(np.array([*ids[1:20], 7, *ids[1:20], 8]), np.array([19, 39]))
    for place, (row, token) in enumerate(zip(batch_rows, (7, 8), strict=True)):
        next_ids, hidden = np.array([*ids[1:20], token]), case.hidden[:20]
        normed, wanted = case.wanted(next_ids, hidden)
        assert_near(logits[place], wanted[19])
        # of two rows one goes on
        if row == 2:
            batch.begin_step()
            batch.add_row(row, [30], 20, is_prefill=False)
            again = runner.predict_more(np.array([30]), [0], follows=[1])
            more = case.wanted(np.array([*next_ids, 30]), np.array([*hidden, normed[19]]))[1]
            assert_near(again[0], more[20])


def test_the_norm_of_the_model_comes_first() -> None:
    """Guards the tests above: hidden states before `model.norm` would give other logits."""
    case = Case(V32, ())
    raw = case.hidden / case.tensors["model.norm.weight"]
    wrong = case.wanted(IDS[1:], raw)[1]
    assert np.abs(wrong - case.logits).max() > 0.05 * np.abs(case.logits).max()


# as in the index of DeepSeek-V3.2's checkpoint, layer 61, without the decoder layer's own
OF_A_RELEASE = {
    "model.layers.61.embed_tokens.weight": (129280, 7168),
    "model.layers.61.enorm.weight": (7168,),
    "model.layers.61.hnorm.weight": (7168,),
    "model.layers.61.eh_proj.weight": (7168, 14336),
    "model.layers.61.shared_head.norm.weight": (7168,),
    "model.layers.61.shared_head.head.weight": (129280, 7168),
    "model.layers.61.self_attn.indexer.wk.weight": (128, 7168),
    "model.layers.61.mlp.experts.255.down_proj.weight": (7168, 2048),
}


def test_names_of_the_releases() -> None:
    config = config_from_dict({"model_type": "deepseek_v32", "num_nextn_predict_layers": 1})
    names = expected_tensors(config.with_mtp_layer(*LAYERS["own"]))
    assert {name: names[name].shape for name in OF_A_RELEASE} == OF_A_RELEASE
    assert [name for name in OF_A_RELEASE if names[name].quantisable] == list(OF_A_RELEASE)[6:]
    assert not expected_tensors(config).keys() & OF_A_RELEASE.keys()
    # GLM-5's list of kinds of indexers ends before the layer, which has a full one
    glm = config_from_dict({"model_type": "glm_moe_dsa", "num_nextn_predict_layers": 1})
    assert "model.layers.78.self_attn.indexer.wk.weight" in expected_tensors(glm.with_mtp_layer())


def stored_checkpoint(fields: dict[str, Any], layer: tuple[str, ...]) -> dict[str, Stored]:
    """Tensors of a checkpoint with its layer: bfloat16, and FP8 where the model has it."""
    config = config_from_dict(fields).with_mtp_layer(*layer)
    draw, tensors = np.random.default_rng(0), {}
    for name, expected in expected_tensors(config).items():
        shape = expected.shape
        if expected.quantisable and config.weight_block_size:
            tensors[name] = f8(draw.integers(40, 50, shape))
            blocks = [-(-size // 128) for size in shape]
            tensors[name + SCALE_SUFFIX] = f32(np.full(blocks, 0.5))
        else:
            tensors[name] = bf16(draw.standard_normal(shape) / np.sqrt(shape[-1]))
    return tensors


MTP = {"num_nextn_predict_layers": 1}


@pytest.mark.parametrize("fields", [TINY | MTP, TINY_GLM | MTP, TINY_FP8 | MTP])
def test_a_layer_is_loaded_and_copies_of_the_models_tables_are_shared(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    tensors = stored_checkpoint(fields, LAYERS["own"])
    prefix = f"model.layers.{fields['num_hidden_layers']}."
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    # its tensors may be in a file of their own, which alone may be FP8
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    if fields["model_type"] == "glm_moe_dsa":
        name = f"{prefix}self_attn.q_a_proj.weight"
        shape = own[name].shape
        own |= {name: f8(np.full(shape, 50)), name + SCALE_SUFFIX: f32(np.ones((1, 1)))}
        fields = fields | {"mtp_quantization_config": {"quant_method": "fp8"}}
        write_safetensors(tmp_path / "mtp.safetensors", own)
        own = {}
    folder = write_folder(tmp_path, fields, tensors | own)
    with Checkpoint.open(folder) as checkpoint:
        config = read_config(folder)
        config = add_mtp_layer(checkpoint, config)
        assert config.mtp == (MTP_HEAD,)
        validate(checkpoint, config)
        weights = HostWeights()
        model = create_model(config, weights)
        load_weights(checkpoint, config, weights.loaders)
    # a step that reads all of it
    runner = tiny_runner(model)
    assert np.isfinite(run(runner, 0, 0, [3, 4, 5], [4, 5, 6])).all()
    assert len(runner.caches) == 2 * (config.num_hidden_layers + 1)


def test_a_checkpoint_without_the_layer_is_refused_with_what_it_has(tmp_path: Path) -> None:
    write_folder(tmp_path, TINY | MTP)
    with Checkpoint.open(tmp_path) as checkpoint:
        config = read_config(tmp_path)
        with pytest.raises(ConfigError, match=r"got 'mtp', .* has layers 0 to 2, and no tensor"):
            add_mtp_layer(checkpoint, config)
        config = replace(config, num_nextn_predict_layers=0)
        with pytest.raises(ConfigError, match="no layer for it"):
            add_mtp_layer(checkpoint, config)
    shutil.copytree(demo_model_path(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "mtp.safetensors").unlink()
    asked = EngineConfig(model=tmp_path, device="cpu", speculative_config={"method": "mtp"})
    with pytest.raises(ConfigError, match=r"^--speculative-config.method: got 'mtp', allowed: ng"):
        make_plan(asked)


def test_drafts_of_the_demo_models_layer_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    # whatever else this machine does now
    monkeypatch.setattr(
        build, "measure_step_costs", lambda *_: DraftCosts({1: [1.0, 1.1, 1.2, 1.3]})
    )
    drafts = {"method": "mtp", "num_speculative_tokens": 3}
    greedy = SamplingParams(temperature=0, max_tokens=64)
    question = [{"role": "user", "content": "Tell me a story about a fox."}]
    with LLM(device="cpu", max_model_len=512) as plain:
        [wanted] = plain.chat(question, greedy)
    with LLM(device="cpu", max_model_len=512, speculative_config=drafts) as llm:
        [found] = llm.chat(question, greedy)
        stats = llm.stats()
    assert found.token_ids == wanted.token_ids
    assert stats.num_accepted_tokens > 0.6 * stats.num_draft_tokens > 10


def test_memory_of_the_layer_is_planned() -> None:
    config = config_from_dict(TINY | MTP)
    more = config.with_mtp_layer()
    layer = 2 * 32 * 32 + 3 * 32
    layer += weight_bytes(replace(config, num_hidden_layers=1, mlp_layer_types=("sparse",))) // 4
    layer -= 2 * 50 * 32 + 32
    assert weight_bytes(more) - weight_bytes(config) == 4 * layer
    assert (len(more.has_indexer), more.num_indexer_layers) == (4, 4)
