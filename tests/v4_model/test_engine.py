"""The engine over DeepSeek-V4: Hugging Face's tokens in every batch, with hits and preemption."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.errors import CheckpointError, ConfigError
from fd_dsa.startup.plan import make_plan
from tests.v4_model.cases import CASES, GREEDY, GREEDY_PROMPTS, STEPS
from tests.v4_model.test_parity import GOLDENS

CASE = CASES[GREEDY]
PROMPTS = [CASE.prompt(length) for length in GREEDY_PROMPTS]
PARAMS = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
# the reference never ends its text; a step whose two best logits are closer may go either way
REFERENCE = SamplingParams(temperature=0, max_tokens=STEPS, min_tokens=STEPS)
MARGIN = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with layers of all kinds and a tokenizer."""
    return CASE.write_served(tmp_path_factory.mktemp("served"))


def check_tokens(found: list[list[int]], wanted: Any, margins: Any) -> None:
    """Compare answers up to where rounding may decide; most of them to their end."""
    ends = [[*(one <= MARGIN), True].index(True) for one in margins]
    assert sum(end == STEPS for end in ends) >= 0.7 * len(ends), ends
    for tokens, reference, end in zip(found, wanted, ends, strict=True):
        assert tokens[:end] == list(reference[:end])


def engine_of(folder: Path, **fields: Any) -> LLM:
    """An engine with small blocks."""
    sizes = {"block_size": CASE.block_size, "max_num_seqs": 4, "device": "cpu"}
    return LLM(model=folder, **(sizes | fields))


def tokens_of(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Answers to prompts in one call."""
    answers = llm.generate(prompts, params)
    return [output.token_ids for answer in answers for output in answer.outputs]


FORMS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "one request at a time": {"max_num_seqs": 1},
    "chunks of 24 beside answers": {"max_num_batched_tokens": 24},
    "two rows, no prefix caching": {"max_num_seqs": 2, "enable_prefix_caching": False},
    "preemption": {"num_gpu_blocks_override": 10, "max_model_len": 96},
    "host memory": {
        "num_gpu_blocks_override": 10,
        "max_model_len": 96,
        "max_num_seqs": 1,
        "kv_offload_bytes": "64M",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_hugging_face(form: str, folder: Path) -> None:
    with np.load(GOLDENS / f"{GREEDY}.npz") as data:
        wanted, margins = (data[f"greedy_{name}"][:, :STEPS] for name in ("tokens", "margins"))
    with engine_of(folder, **FORMS[form]) as llm:
        # the second round finds the prompts in the prefix cache
        for _ in range(2):
            check_tokens(tokens_of(llm, PROMPTS, REFERENCE), wanted, margins)
        assert (llm.stats().num_preemptions > 0) == (form == "preemption")
        # with few blocks what was cached is gone before it is asked for
        if form != "preemption":
            has_hits = FORMS[form].get("enable_prefix_caching", True)
            assert (llm.stats().prefix_cache_hits > 0) == has_hits
        assert (llm.stats().prefix_cache_host_hits > 0) == (form == "host memory")


@pytest.mark.oracle
def test_tokens_live(folder: Path) -> None:
    from tests.v4_model.hugging_face import greedy, load

    model = load(folder)
    prompts = [CASE.prompt(length) for length in (2, 33, 64, 130)]
    with engine_of(folder) as llm:
        found = tokens_of(llm, prompts, REFERENCE)
    check_tokens(found, *zip(*(greedy(model, prompt, STEPS) for prompt in prompts), strict=True))


def test_several_outputs_are_those_of_one_alone(folder: Path) -> None:
    """Outputs of one request take the blocks of the first, also without prefix caching."""
    prompt = CASE.prompt(52)
    several = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8, ignore_eos=True)
    with engine_of(folder, enable_prefix_caching=False, max_num_seqs=1) as llm:
        wanted = tokens_of(llm, [prompt], several)
    with engine_of(folder, enable_prefix_caching=False) as llm:
        found = tokens_of(llm, [prompt], several)
    assert found == wanted
    assert len({*map(tuple, found)}) == 3


def test_names_of_deepseek_and_draft_layers(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same weights under DeepSeek's names, `mtp.*` beside them, answer the same."""
    CASE.write_served(tmp_path)
    CASE.write(tmp_path, "deepseek")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"mtp.0.enorm.weight": np.ones(48, np.float32)}, path)
    with engine_of(folder) as llm:
        wanted = tokens_of(llm, PROMPTS[:1], PARAMS)
    with caplog.at_level(logging.INFO, "fd_dsa"), engine_of(tmp_path) as llm:
        assert tokens_of(llm, PROMPTS[:1], PARAMS) == wanted
    assert sum("1 tensors skipped" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"device": "cpu", "block_size": 24}, "--block-size: got 24"),
        (
            {"kv_offload_bytes": "1G", "enable_prefix_caching": False},
            "--kv-offload-bytes: got 1073741824, allowed: 0 without prefix caching",
        ),
        ({"kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype: got 'bfloat16'"),
        ({"kv_cache_dtype": "fp8", "block_size": 64}, "--kv-cache-dtype: got 'fp8_ds_mla'"),
    ],
)
def test_flags_that_are_refused(fields: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan(EngineConfig(model=folder, **({"device": "cpu", "block_size": 16} | fields)))


def test_experts_that_do_not_exist(tmp_path: Path) -> None:
    CASE.write_served(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.ffn.gate.tid2eid"][3, 1] = 6
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="numbers from 0 to 6, allowed are 0 to 5"):
        engine_of(tmp_path)


def test_random_weights(folder: Path) -> None:
    """`--load-format dummy` needs no weights."""
    with engine_of(folder, load_format="dummy") as llm:
        assert len(tokens_of(llm, PROMPTS[:1], PARAMS)[0]) == STEPS


def test_a_smaller_second_try_changes_no_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failed chunk has overwritten the states of unfinished entries."""
    with engine_of(folder, max_num_batched_tokens=5, max_model_len=96) as llm:
        wanted = tokens_of(llm, PROMPTS[:1], PARAMS)
        llm.engine.block_manager.reset_prefix_cache()
        execute, calls = llm.engine.runner.execute_model, list[int]()

        def failing(*arguments: Any) -> Any:
            logits = execute(*arguments)
            calls.append(0)
            if len(calls) == 3:
                raise MemoryError("no page is free")
            return logits

        monkeypatch.setattr(llm.engine.runner, "execute_model", failing)
        assert tokens_of(llm, PROMPTS[:1], PARAMS) == wanted
