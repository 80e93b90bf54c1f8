"""Whatever the load, the chunks and the cache: same tokens, no starvation, nothing left over."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.engine.sampling_params import SamplingParams
from tests.engine.fakes import VOCAB_SIZE, make_engine, random_clock, run_all


@dataclass(frozen=True)
class Arrival:
    """A request and the step before which it comes."""

    prompt: tuple[int, ...]
    params: SamplingParams
    at_step: int


@st.composite
def arrivals(draw):
    """A request that fits a context of 48 tokens."""
    prompt = draw(st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=30))
    max_tokens = draw(st.integers(1, 18))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.8, 2.0])),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.7])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 1.0])),
        logit_bias=draw(st.none() | st.dictionaries(st.integers(0, 39), st.floats(-5, 5))),
        bad_words=draw(st.none() | st.lists(st.text("abc", min_size=1, max_size=3), max_size=3)),
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=draw(st.none() | st.lists(st.integers(2, 39), max_size=3)),
        seed=draw(st.integers(0, 5)),
        max_tokens=max_tokens,
        ignore_eos=draw(st.booleans()),
    )
    return Arrival(tuple(prompt), params, draw(st.integers(0, 12)))


def tokens_alone(arrival):
    """Output of a request that has an ample engine for itself."""
    engine = make_engine(max_model_len=48, max_num_batched_tokens=64)
    engine.add_request("r", arrival.prompt, arrival.params)
    return run_all(engine)["r"][-1].token_ids


def check_step(engine, budget):
    """Invariants of the step just run, as the runner saw it."""
    step = engine.runner.steps[-1]
    assert 0 < sum(num_new for num_new, _, _ in step.values()) <= budget
    assert all(num_new == 1 for num_new, _, is_prefill in step.values() if not is_prefill)
    stats = engine.stats()
    assert stats.num_used_blocks <= stats.num_blocks
    assert 0 <= stats.kv_cache_usage <= 1


@settings(max_examples=60)
@given(
    requests=st.lists(arrivals(), min_size=1, max_size=8),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 70),
    block_size=st.sampled_from([1, 4, 16]),
    spare_blocks=st.integers(0, 20),
    target_gap_s=st.sampled_from([0, 1e-3, 0.1, 10]),
    clock_seed=st.integers(0, 1000),
)
def test_tokens_depend_on_the_request_alone(
    requests, max_num_seqs, budget, block_size, spare_blocks, target_gap_s, clock_seed
):
    longest = max(len(one.prompt) + one.params.max_tokens - 1 for one in requests)
    engine = make_engine(
        num_blocks=-(-longest // block_size) + spare_blocks,
        block_size=block_size,
        max_model_len=48,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        target_gap_s=target_gap_s,
    )
    engine.clock = random_clock(clock_seed)
    results = {}
    pending = sorted(enumerate(requests), key=lambda entry: entry[1].at_step)
    for step in range(20_000):
        while pending and pending[0][1].at_step <= step:
            index, one = pending.pop(0)
            engine.add_request(str(index), one.prompt, one.params)
        if engine.has_unfinished_requests():
            for output in engine.step():
                results[int(output.request_id)] = output
            check_step(engine, budget)
        elif not pending:
            break
    assert not engine.has_unfinished_requests() and not pending
    for index, one in enumerate(requests):
        assert results[index].finished
        assert results[index].token_ids == tokens_alone(one), f"request {index}"
    assert engine.stats().num_used_blocks == 0
    assert (engine.runner.input_batch.block_tables == -1).all()


def greedy(max_tokens):
    """Greedy parameters that do not end early."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def test_preemption_takes_the_latest_and_loses_nothing():
    engine = make_engine(num_blocks=9, block_size=4, max_model_len=36)
    prompts = {"first": [2] * 9, "second": [3] * 9}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(20))
    outputs = run_all(engine)
    assert engine.stats().num_preemptions > 0
    assert outputs["first"][-1].finish_time < outputs["second"][-1].finish_time
    for name, prompt in prompts.items():
        alone = tokens_alone(Arrival(tuple(prompt), greedy(20), 0))
        assert outputs[name][-1].token_ids == alone
        assert [token for output in outputs[name] for token in output.new_token_ids] == alone


def test_decode_goes_on_while_a_long_prompt_is_read_in_chunks():
    engine = make_engine(max_num_batched_tokens=8, block_size=4)
    engine.add_request("talks", [2, 3], greedy(20))
    engine.step()
    engine.add_request("reads", [4] * 30, greedy(2))
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


def test_a_chunk_inside_the_prompt_gives_no_token():
    engine = make_engine(max_num_batched_tokens=8)
    engine.add_request("r", [4] * 17, greedy(3))
    assert [len(engine.step()) for _ in range(4)] == [0, 0, 1, 1]


def test_short_requests_wait_behind_a_long_one_only_for_its_share():
    engine = make_engine(max_num_batched_tokens=16)
    engine.add_request("long", [4] * 40, greedy(2))
    engine.add_request("short", [5] * 3, greedy(2))
    first = {}
    for step in range(10):
        for output in engine.step():
            first.setdefault(output.request_id, step)
    assert first == {"long": 2, "short": 2}


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_fewer_tokens_than_rows_serve_everyone_in_order_of_arrival(budget):
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=budget)
    for name in "abcdefg":
        engine.add_request(name, [ord(name) - 90] * 2, greedy(8))
    outputs = run_all(engine, max_steps=7 * 12)
    ends = [outputs[name][-1].finish_time for name in "abcdefg"]
    assert ends == sorted(ends)
    assert all(len(outputs[name]) == 8 for name in "abcdefg")
