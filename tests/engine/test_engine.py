"""The engine over a fake runner: tokens, text, ends, refusals, failures, order of service.

That tokens depend on their request alone, whatever the load, that nobody starves and that requests
are served in order, is shown by `tests.soak.histories`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fd_dsa.engine.sampling_params import SamplingParams
from tests.engine.fakes import EOS, VOCAB_SIZE, expected_greedy, make_engine, run_all

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LETTERS = ["", ""] + [chr(ord("a") + i) for i in range(26)] + [chr(ord("A") + i) for i in range(12)]


def letters(token_ids):
    """Text of token ids in the fake vocabulary."""
    return "".join(LETTERS[token_id] for token_id in token_ids)


def run_one(engine, prompt, params):
    """All outputs of one request."""
    engine.add_request("r", prompt, params)
    return run_all(engine)["r"]


@pytest.mark.parametrize("prompt_length", [1, 3, 4, 5, 16, 17, 40])
def test_greedy_tokens_follow_the_whole_history(prompt_length):
    prompt = [2 + i % 30 for i in range(prompt_length)]
    outputs = run_one(make_engine(), prompt, GREEDY)
    expected = expected_greedy(prompt, 12, eos=None)
    assert outputs[-1].token_ids == expected
    assert [token for output in outputs for token in output.new_token_ids] == expected
    assert outputs[-1].text == "".join(output.new_text for output in outputs) == letters(expected)
    assert [output.finish_reason for output in outputs] == [None] * 11 + ["length"]
    # an output stays as it was after later steps
    assert [len(output.token_ids) for output in outputs] == list(range(1, 13))
    assert [output.text for output in outputs] == [letters(expected[:n]) for n in range(1, 13)]
    assert outputs[-1].prompt_token_ids == prompt


def find_eos_prompt():
    """A prompt whose greedy continuation reaches end-of-sequence after a few tokens."""
    for first in range(2, VOCAB_SIZE):
        for second in range(2, VOCAB_SIZE):
            tokens = expected_greedy([first, second], 12)
            if 3 <= len(tokens) < 12:
                return [first, second], tokens
    raise AssertionError("the fake model never ends")


def test_end_of_sequence_ends_the_request_and_shows_no_text_unless_ignored():
    prompt, expected = find_eos_prompt()
    last = run_one(make_engine(), prompt, SamplingParams(temperature=0, max_tokens=50))[-1]
    assert last.token_ids == expected
    assert last.text == letters(expected[:-1])
    assert (last.finish_reason, last.stop_reason) == ("stop", EOS)
    last = run_one(make_engine(), prompt, GREEDY)[-1]
    assert last.token_ids == expected_greedy(prompt, 12, eos=None)
    assert last.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "no tokens"),
        ([2] * 64, 1, "prompt has 64 tokens, max_model_len is 64"),
        ([2] * 60, 5, "60 tokens and max_tokens is 5, together 65"),
        ([2] * 40, 10, "need 13 cache blocks of 4 tokens; there are 12"),
        ([2, VOCAB_SIZE], 4, f"token 1 of the prompt is {VOCAB_SIZE}"),
        ([2, 3, -1], 4, "token 2 of the prompt is -1"),
        ([2, 3.0], 4, "float64"),
        (["a"], 4, "flat list of integers"),
        ([[2]], 4, "flat list of integers"),
    ],
)
def test_a_request_that_can_never_run_is_refused_at_once(prompt, max_tokens, message):
    engine = make_engine(num_blocks=12)
    with pytest.raises(ValueError, match=message):
        engine.add_request("r", prompt, SamplingParams(max_tokens=max_tokens))
    assert not engine.has_unfinished_requests()
    # one that just fits the cache
    assert len(run_one(engine, [2] * 40, replace(GREEDY, max_tokens=9))[-1].token_ids) == 9


def test_an_id_in_use_is_refused_and_free_again_after_the_end():
    engine = make_engine()
    engine.add_request("r", [2], GREEDY)
    with pytest.raises(ValueError, match="'r' is in use"):
        engine.add_request("r", [3], GREEDY)
    run_all(engine)
    assert run_one(engine, [3], GREEDY)[-1].token_ids == expected_greedy([3], 12, eos=None)


def test_abort_ends_a_running_and_a_waiting_request_and_frees_all():
    engine = make_engine(max_num_seqs=1)
    engine.add_request("runs", [2, 3], GREEDY)
    engine.add_request("waits", [4, 5], GREEDY)
    engine.step()
    engine.step()
    (aborted,) = engine.abort_request("runs")
    assert aborted.finish_reason == "abort"
    assert aborted.token_ids == expected_greedy([2, 3], 2, eos=None)
    assert engine.abort_request("waits")[0].token_ids == []
    assert engine.abort_request("runs") == []
    assert engine.stats().num_used_blocks == 0
    assert not engine.has_unfinished_requests()
    assert engine.step() == []


def test_times_are_in_order():
    outputs = run_one(make_engine(), [2, 3], GREEDY)
    last = outputs[-1]
    assert last.arrival_time <= last.first_token_time <= last.finish_time
    assert outputs[0].first_token_time == last.first_token_time
    assert outputs[0].finish_time is None


def test_logits_that_are_not_finite_end_their_request_alone():
    engine = make_engine()
    prompts = {"a": [2], "b": [3]}
    expected = {name: expected_greedy(prompt, 12, eos=None) for name, prompt in prompts.items()}
    poison = next(token for token in expected["a"] if token not in [2, 3, *expected["b"]])
    engine.runner.nan_after = poison
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    outputs = run_all(engine)
    failed = outputs["a"][-1]
    assert failed.finish_reason == "error"
    assert "not finite" in str(failed.error)
    assert failed.token_ids == expected["a"][: expected["a"].index(poison) + 1]
    assert outputs["b"][-1].token_ids == expected["b"]
    assert engine.stats().num_used_blocks == 0


def test_a_failing_step_raises_and_can_be_run_again():
    engine = make_engine()
    engine.add_request("r", [2] * 20, GREEDY)
    engine.step()
    engine.runner.fail_at = 1
    with pytest.raises(OSError, match="device is gone"):
        engine.step()
    engine.runner.fail_at = None
    assert run_all(engine)["r"][-1].token_ids == expected_greedy([2] * 20, 12, eos=None)


def test_stats_count_what_happened():
    engine = make_engine()
    engine.add_request("a", [2] * 5, GREEDY)
    engine.add_request("b", [3] * 6, GREEDY)
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 0)
    assert stats.num_used_blocks == 4
    assert stats.kv_cache_usage == 4 / 64
    run_all(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_used_blocks, stats.num_preemptions) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.generated_tokens, stats.num_steps) == (11, 24, 12)
    assert stats.host_time_s > 0 and stats.runner_time_s > 0


def test_unseeded_requests_differ_and_the_engine_seed_repeats_them():
    def texts(seed):
        engine = make_engine(seed=seed)
        for name in "abc":
            engine.add_request(name, [2, 3], SamplingParams(max_tokens=10, ignore_eos=True))
        return [outputs[-1].text for _, outputs in sorted(run_all(engine).items())]

    assert len(set(texts(0))) == 3
    assert texts(0) == texts(0)
    assert set(texts(0)).isdisjoint(texts(1))


def test_prompt_ids_may_be_a_numpy_array():
    outputs = run_one(make_engine(), np.array([2, 3]), GREEDY)
    assert outputs[-1].token_ids == expected_greedy([2, 3], 12, eos=None)
    assert type(outputs[-1].prompt_token_ids[0]) is int


def test_decode_goes_on_while_a_long_prompt_is_read_in_chunks():
    engine = make_engine(max_num_batched_tokens=8, block_size=4)
    engine.add_request("talks", [2, 3], replace(GREEDY, max_tokens=20))
    engine.step()
    engine.add_request("reads", [4] * 30, replace(GREEDY, max_tokens=2))
    chunks = []
    while engine.has_unfinished_requests() and len(chunks) < 5:
        outputs = engine.step()
        chunks.append(engine.runner.steps[-1])
        assert "talks" in [output.request_id for output in outputs]
    # 30 tokens at 7 a step: the decoding row takes one token of each step
    assert [step[1] for step in chunks] == [
        (7, 0, True),
        (7, 7, True),
        (7, 14, True),
        (7, 21, True),
        (2, 28, True),
    ]
    assert all(step[0][0] == 1 and not step[0][2] for step in chunks)


def test_short_requests_wait_behind_a_long_one_only_for_its_share():
    engine = make_engine(max_num_batched_tokens=16)
    engine.add_request("long", [4] * 40, replace(GREEDY, max_tokens=2))
    engine.add_request("short", [5] * 3, replace(GREEDY, max_tokens=2))
    first = {}
    for step in range(10):
        for output in engine.step():
            first.setdefault(output.request_id, step)
    assert first == {"long": 2, "short": 2}
