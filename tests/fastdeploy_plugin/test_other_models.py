"""GLM-5, shared selections and YaRN in the double: random models, as in the embedded engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fd_dsa.runner import InputBatch, ModelRunner
from tests.fakes.driver import Engine, Job
from tests.fakes.trees import TREES
from tests.fastdeploy_plugin.engines import ours
from tests.fastdeploy_plugin.watching import watch_steps
from tests.parity.cases import CASES, Case
from tests.parity.engine_side import load_model
from tests.runner.dsa import dsa_runner

# widths that an fp8_ds_mla cache has, over selections that prompts outgrow
_SIZES = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "index_topk": 24,
    "num_key_value_heads": 4,
}
_GLM = CASES["glm"].config | _SIZES | {"indexer_rope_interleave": True}
MODELS = {
    case.name: case
    for case in (
        Case("glm", _GLM, seed=102),
        Case(
            "glm-shared",
            _GLM,
            {"indexer_types": ["full", "shared", "shared", "full"], "num_hidden_layers": 4},
            seed=103,
        ),
        Case("yarn", CASES["v32-yarn"].config | _SIZES, seed=101),
    )
}
LENGTHS, NUM_TOKENS = (90, 20, 50), 8
# prompts are read in eager steps, the rest comes from graphs
SIZES = {
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "use_cudagraph": True,
    "cudagraph_capture_sizes": [4, 2],
}
# a code of an e4m3 key that falls the other way moves a logit by less
LEAST_LEAD = 0.02


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case, its folder, and its answers."""
    case = MODELS[request.param]
    folder = case.write(tmp_path_factory.mktemp(case.name))
    _round_norms(folder / "model.safetensors")
    batch = InputBatch(1, 256, 4, 64)
    loaded = load_model(folder)
    layout = loaded.config.cache_layout("fp8_ds_mla", 64)
    runner = dsa_runner(loaded, batch, layout, num_blocks=4)
    batch.set_blocks(0, [2, 0, 3, 1])
    return case, folder, [greedy(runner, case.prompt(n)) for n in LENGTHS]


def _round_norms(file: Path) -> None:
    """Leave of the RMSNorms' weights what FastDeploy's bfloat16 holds."""
    tensors = load_file(file)
    for name, array in tensors.items():
        if "norm" in name and "k_norm" not in name:
            tensors[name] = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
    save_file(tensors, file)


def greedy(runner: ModelRunner, prompt: list[int]) -> list[int]:
    """Return the tokens after a prompt by the embedded engine's runner, which lead clearly."""
    tokens, ids, done = [], list(prompt), 0
    while len(tokens) < NUM_TOKENS:
        runner.input_batch.begin_step()
        last = runner.input_batch.add_row(0, ids, done, is_prefill=not done)
        logits = runner.execute_model(np.array([last]))[0]
        second, best = np.sort(logits)[-2:]
        assert best - second > LEAST_LEAD
        done += len(ids)
        ids = [int(logits.argmax())]
        tokens += ids
    return tokens


def test_answers_are_those_of_the_embedded_engine(model: Any) -> None:
    case, folder, answers = model
    with ours(TREES["develop"]):
        engine = Engine(folder, 24, **SIZES)
        watch = watch_steps(engine)
        jobs = [Job(case.prompt(n), NUM_TOKENS, chunk=40) for n in LENGTHS]
        assert engine.generate(jobs) == answers
    assert {"later chunk", "mixed", "decode", "graph"} <= watch.kinds()
    # a layer that shares a selection has no keys of its own
    assert watch.trespasses == []
