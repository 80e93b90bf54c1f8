"""Order of service: nobody starves, nothing is lost, and decoding goes on beside prompts.

That tokens depend on their request alone, whatever the load, is shown by `tests.soak.histories`.
"""

from __future__ import annotations

import pytest

from fd_dsa.engine.sampling_params import SamplingParams
from tests.engine.fakes import expected_greedy, make_engine, run_all


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
        alone = expected_greedy(prompt, 20, eos=None)
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
