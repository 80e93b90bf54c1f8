"""What every mode is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fd_dsa.accuracy.matrix.modes import MODES
from fd_dsa.accuracy.matrix.running import engine_fields
from fd_dsa.accuracy.matrix.workload import FULL, QUICK, Hidden, Workload, make_workload
from fd_dsa.accuracy.retrieval.plan import Limits
from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ConfigError
from tests.engine.fakes import byte_tokenizer

LIMITS = Limits(256, 2048)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo_model_path())


@pytest.fixture(scope="module")
def workload(tokenizer: Tokenizer) -> Workload:
    hidden = (*QUICK.retrieval, Hidden(("multikey",), "max", (0.5,)))
    return make_workload(demo_model_path(), tokenizer, LIMITS, replace(QUICK, retrieval=hidden))


def test_every_request_has_a_key_and_what_it_is_scored_with(workload: Workload) -> None:
    keys = [request.key for request in workload.requests]
    assert len(set(keys)) == len(keys) == 3 + 2 + 6
    assert {key for key in keys if key.startswith("ifeval/")} == {
        f"ifeval/{prompt.key}" for prompt in workload.prompts
    }
    assert {key for key in keys if key.startswith("retrieval/")} == set(workload.questions)
    # texts go on to their end, whatever the model says
    assert all(r.ignore_eos == r.key.startswith("text/") for r in workload.requests)
    assert [key.partition("/")[0] for key in keys[:6]] == ["text"] * 6


def test_prompts_have_their_lengths_and_fit(workload: Workload) -> None:
    lengths = {request.key: len(request.token_ids) for request in workload.requests}
    assert lengths["retrieval/passkey/316/0.1/0"] == 316
    assert workload.longest_sequence == LIMITS.max_model_len
    assert workload.longest_prompt == 2048 - QUICK.retrieval_tokens
    short = workload.without_long_ones()
    assert len(short.requests) == len(workload.requests) - 1
    assert short.longest_sequence <= QUICK.short


def test_the_same_arguments_ask_the_same(workload: Workload, tokenizer: Tokenizer) -> None:
    again = make_workload(demo_model_path(), tokenizer, LIMITS, workload.scale)
    assert again.digest == workload.digest


def test_numbers_of_an_engine_follow_from_it(workload: Workload) -> None:
    by_name = {mode.name: mode for mode in MODES}
    assert engine_fields(by_name["one-shot"], workload)["max_num_batched_tokens"] == (
        workload.longest_prompt
    )
    ample = engine_fields(by_name["reference"], workload)["num_gpu_blocks_override"]
    assert ample == sum(-(-(len(r.token_ids) + r.max_tokens - 1) // 64) for r in workload.requests)
    short = workload.without_long_ones()
    few = engine_fields(by_name["preemption"], short)["num_gpu_blocks_override"]
    assert short.blocks(1, 64) < few < short.blocks(32, 64) and few % 2 == 1


def test_models_that_cannot_be_asked(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        make_workload(demo_model_path(), byte_tokenizer(), LIMITS, QUICK)
    with pytest.raises(ConfigError, match="--lengths: got 316"):
        make_workload(demo_model_path(), tokenizer, Limits(256, 320), QUICK)
    with pytest.raises(ConfigError, match="does not say how long"):
        make_workload(demo_model_path(), tokenizer, Limits(256, None), QUICK)


def test_the_whole_matrix_goes_past_the_selection() -> None:
    assert {hidden.lengths for hidden in FULL.retrieval} == {"topk,4*topk", "12*topk", "max"}
    assert FULL.ifeval >= 64 and FULL.perplexity_tokens >= 4096
