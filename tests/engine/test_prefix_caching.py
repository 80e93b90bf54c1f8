"""Prefix caching of the engine over a fake runner; its tokens follow from what its cache holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fd_dsa.engine.sampling_params import SamplingParams
from tests.engine.fakes import expected_greedy, make_engine, run_all

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
# 18 tokens: four blocks of 4 and a half one
PREFIX = [5, 9, 2, 31, 17, 8, 8, 20, 3, 12, 30, 6, 7, 25, 11, 4, 19, 22]


def answer(engine, prompt, params=GREEDY, name="r"):
    """Last output of a request that has the engine for itself."""
    engine.add_request(name, prompt, params)
    return run_all(engine)[name][-1]


def first_chunk(engine):
    """Tokens, and tokens before them, of the only row of the step just run."""
    (row,) = engine.runner.steps[-1].values()
    return row[:2]


def hits(engine):
    """Tokens that were found, of those that were looked for."""
    stats = engine.stats()
    return stats.prefix_cache_hits, stats.prefix_cache_queries


def test_a_prompt_that_begins_alike_is_computed_from_where_it_differs():
    engine = make_engine()
    assert answer(engine, [*PREFIX, 1]).num_cached_tokens == 0
    assert hits(engine) == (0, 19)
    engine.add_request("r", [*PREFIX, 2, 3], GREEDY)
    engine.step()
    assert first_chunk(engine) == (4, 16)
    output = run_all(engine)["r"][-1]
    assert output.token_ids == expected_greedy([*PREFIX, 2, 3], 6, eos=None)
    assert output.num_cached_tokens == 16
    assert hits(engine) == (16, 19 + 20)
    assert engine.stats().prompt_tokens == 19 + 20


@pytest.mark.parametrize(("num_tokens", "cached"), [(18, 16), (17, 16), (16, 12), (4, 0), (5, 4)])
def test_the_last_token_of_a_prompt_is_always_computed(num_tokens, cached):
    engine = make_engine()
    answer(engine, PREFIX)
    output = answer(engine, PREFIX[:num_tokens])
    assert output.num_cached_tokens == cached
    assert output.token_ids == expected_greedy(PREFIX[:num_tokens], 6, eos=None)


@pytest.mark.parametrize("dtype", ["u1", ">i4", "i8"])
def test_an_array_shares_the_blocks_of_a_list_whatever_becomes_of_it(dtype):
    engine = make_engine()
    prompt = np.array(PREFIX, dtype)
    engine.add_request("array", prompt, GREEDY)
    prompt[:] = 0
    assert run_all(engine)["array"][-1].prompt_token_ids == PREFIX
    output = answer(engine, PREFIX)
    assert output.num_cached_tokens == 16
    assert output.token_ids == expected_greedy(PREFIX, 6, eos=None)


def test_a_conversation_hits_its_own_answers():
    engine = make_engine()
    prompt = PREFIX[:10]
    for cached in (0, 12, 20):
        output = answer(engine, prompt)
        assert output.num_cached_tokens == cached
        assert output.token_ids == expected_greedy(prompt, 6, eos=None)
        prompt = [*prompt, *output.token_ids, 9, 9]


def test_running_requests_share_what_finished_steps_have_filled():
    engine = make_engine(max_num_batched_tokens=8)
    engine.add_request("first", PREFIX, GREEDY)
    engine.step()
    engine.step()
    # 16 tokens of `first` are computed, and its next step takes 2 of 8 tokens
    engine.add_request("second", [*PREFIX, 3], GREEDY)
    engine.step()
    assert list(engine.runner.steps[-1].values()) == [(2, 16, True), (3, 16, True)]
    # five blocks each, four of them the same
    assert engine.stats().num_used_blocks == 6
    outputs = run_all(engine)
    assert outputs["first"][-1].token_ids == expected_greedy(PREFIX, 6, eos=None)
    assert outputs["second"][-1].token_ids == expected_greedy([*PREFIX, 3], 6, eos=None)
    assert engine.stats().num_used_blocks == 0


@pytest.mark.parametrize(("num_blocks", "num_running"), [(7, 1), (8, 2)])
def test_admission_asks_for_new_blocks_alone_and_one_to_spare(num_blocks, num_running):
    engine = make_engine(num_blocks=num_blocks, max_num_batched_tokens=32, max_model_len=28)
    prompts = {"first": PREFIX, "second": [*PREFIX[:16], 9, 9, 9, 9, 9]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
        engine.step()
    # `first` owns five blocks; `second` needs two of its own after four of them
    assert engine.stats().num_running == num_running
    for name, outputs in run_all(engine).items():
        assert outputs[-1].token_ids == expected_greedy(prompts[name], 6, eos=None)


def test_a_request_may_ask_for_its_whole_prompt_to_be_computed():
    engine = make_engine(max_num_batched_tokens=32)
    whole = replace(GREEDY, skip_reading_prefix_cache=True)
    for _ in range(2):
        engine.add_request("r", PREFIX, whole)
        engine.step()
        assert first_chunk(engine) == (18, 0)
        run_all(engine)
    assert hits(engine) == (0, 0)
    # what it computed is there for others
    assert answer(engine, PREFIX).num_cached_tokens == 16


def test_without_prefix_caching_all_is_computed():
    engine = make_engine(enable_prefix_caching=False)
    for _ in range(2):
        output = answer(engine, PREFIX)
        assert output.num_cached_tokens == 0
        assert output.token_ids == expected_greedy(PREFIX, 6, eos=None)
    assert hits(engine) == (0, 0)


def test_an_abort_after_a_failed_step_leaves_what_finished_steps_filled():
    engine = make_engine(max_num_batched_tokens=8)
    engine.add_request("fails", PREFIX, GREEDY)
    engine.step()
    engine.runner.fail_at = 1
    with pytest.raises(OSError, match="device is gone"):
        engine.step()
    engine.runner.fail_at = None
    assert engine.abort_request("fails")[0].num_cached_tokens == 0
    assert engine.stats().num_used_blocks == 0
    # the first step had finished
    output = answer(engine, PREFIX)
    assert output.num_cached_tokens == 8
    assert output.token_ids == expected_greedy(PREFIX, 6, eos=None)


def test_logits_that_are_not_finite_empty_the_table():
    engine = make_engine()
    expected = expected_greedy(PREFIX, 6, eos=None)
    engine.add_request("goes on", [9] * 9, replace(GREEDY, max_tokens=20))
    engine.step()
    engine.runner.nan_after = next(token for token in expected if token not in PREFIX)
    engine.add_request("fails", PREFIX, GREEDY)
    assert run_all(engine)["fails"][-1].finish_reason == "error"
    engine.runner.nan_after = None
    assert answer(engine, PREFIX).num_cached_tokens == 0
    # what ran beside it may have read the same blocks
    assert answer(engine, [9] * 9).num_cached_tokens == 0
    assert answer(engine, PREFIX).num_cached_tokens == 16


def test_blocks_are_kept_until_they_are_needed_and_the_oldest_go_first():
    engine = make_engine(num_blocks=12, max_model_len=48)
    prompts = [[token] * 13 for token in (2, 3, 4)]
    params = replace(GREEDY, max_tokens=3)
    for prompt in prompts:
        answer(engine, prompt, params)
    assert engine.stats().num_used_blocks == 0
    # nine blocks are kept, three are free: the fourth needs four, and takes the end of the first
    answer(engine, [5] * 13, params)
    cached = [answer(engine, prompt, params).num_cached_tokens for prompt in reversed(prompts)]
    assert cached == [12, 12, 8]


def test_a_preempted_request_finds_its_own_blocks_again():
    engine = make_engine(num_blocks=9, block_size=4, max_model_len=36)
    prompts = {"first": [2] * 13, "second": [3] * 13}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, replace(GREEDY, max_tokens=10))
    while engine.stats().num_preemptions == 0:
        engine.step()
    num_steps = len(engine.runner.steps)
    outputs = run_all(engine)
    assert engine.stats().num_preemptions == 1
    restarts = [row for step in engine.runner.steps[num_steps:] for row in step.values() if row[2]]
    # of 16 computed tokens in four blocks, `first` needed the last block
    assert restarts == [(5, 12, True)]
    for name, prompt in prompts.items():
        assert outputs[name][-1].token_ids == expected_greedy(prompt, 10, eos=None)
        assert outputs[name][-1].num_cached_tokens == 0
    # both looked once, and found nothing; coming back is not counted
    assert hits(engine) == (0, 26)
