"""n > 1: several outputs of one prompt, which is computed once."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest

from fd_dsa.engine.draws import derive_seed
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.offline.llm import LLM
from tests.engine.fakes import make_engine, run_all
from tests.engine.threaded import threaded

PROMPT = [2 + i % 30 for i in range(18)]


def params(**fields):
    """Random draws that do not end early."""
    return SamplingParams(**{"max_tokens": 6, "ignore_eos": True, "seed": 5, **fields})


def by_index(outputs):
    """The last state of each output, by index."""
    return {output.index: output for output in outputs if output.finished}


def tokens_of_seed(prompt, seed, **fields):
    """Return the tokens that a request of its own generates."""
    engine = make_engine(max_num_batched_tokens=64)
    engine.add_request("r", prompt, params(seed=seed, **fields))
    return run_all(engine)["r"][-1].token_ids


@pytest.mark.parametrize("caching", [True, False])
def test_each_output_has_its_own_seed_and_the_prompt_is_computed_once(caching):
    engine = make_engine(enable_prefix_caching=caching)
    engine.add_request("r", PROMPT, params(n=4))
    outputs = by_index(run_all(engine)["r"])
    assert sorted(outputs) == [0, 1, 2, 3]
    seeds = [5, *(derive_seed(5, index) for index in (1, 2, 3))]
    for index, seed in enumerate(seeds):
        assert outputs[index].token_ids == tokens_of_seed(PROMPT, seed)
    assert len({tuple(output.token_ids) for output in outputs.values()}) == 4
    # 18 tokens once, then what does not fill a block of 4 for each of the others
    prefill = [
        new for step in engine.runner.steps for new, _, is_prefill in step.values() if is_prefill
    ]
    assert sum(prefill) == 18 + 3 * 2
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (18, 24)
    assert stats.prefix_cache_queries == (18 if caching else 0)
    assert stats.prefix_cache_hits == 0
    assert stats.num_used_blocks == 0


def test_blocks_of_the_prompt_are_shared_while_they_run():
    engine = make_engine(enable_prefix_caching=False, max_num_batched_tokens=64)
    engine.add_request("r", PROMPT, params(n=4))
    engine.step()
    engine.step()
    # four full blocks in common; the fifth and later ones are each one's own
    assert engine.stats().num_used_blocks == 4 + 4
    run_all(engine)
    assert engine.stats().num_used_blocks == 0


def test_unseeded_outputs_differ_and_later_requests_have_seeds_of_their_own():
    engine = make_engine()
    for name in "ab":
        engine.add_request(name, PROMPT, params(n=3, seed=None))
    outputs = run_all(engine)
    texts = {out.text for name in "ab" for out in by_index(outputs[name]).values()}
    assert len(texts) == 6


def test_abort_ends_what_is_left_of_a_request():
    engine = make_engine(max_num_seqs=3)
    engine.add_request("r", PROMPT, params(n=5, max_tokens=3))
    seen = []
    while len([output for output in seen if output.finished]) < 2:
        seen += engine.step()
    aborted = engine.abort_request("r")
    assert all(output.finish_reason == "abort" for output in aborted)
    ended = [output.index for output in seen if output.finished]
    assert sorted([*ended, *(output.index for output in aborted)]) == [0, 1, 2, 3, 4]
    assert not engine.has_unfinished_requests()
    assert engine.stats().num_used_blocks == 0
    assert engine.abort_request("r") == []


def test_one_output_is_ended_and_the_others_are_as_they_would_be():
    engine = make_engine()
    engine.add_request("r", PROMPT, params(n=3))
    seen = []
    while not any(output.index == 1 and len(output.token_ids) == 2 for output in seen):
        seen += engine.step()
    (ended,) = engine.finish_output("r", 1)
    assert (ended.index, ended.finish_reason, ended.stop_reason) == (1, "stop", None)
    assert ended.token_ids == tokens_of_seed(PROMPT, derive_seed(5, 1))[:2]
    assert engine.finish_output("r", 1) == []
    outputs = by_index(run_all(engine)["r"])
    assert sorted(outputs) == [0, 2]
    for index in (0, 2):
        seed = derive_seed(5, index) if index else 5
        assert outputs[index].token_ids == tokens_of_seed(PROMPT, seed)
    assert engine.stats().num_used_blocks == 0
    assert engine.finish_output("r", 0) == engine.finish_output("unknown", 0) == []


def test_logits_that_are_not_finite_end_all_outputs():
    engine = make_engine()
    engine.runner.nan_after = PROMPT[-1]
    engine.add_request("r", PROMPT, params(n=3))
    outputs = by_index(run_all(engine)["r"])
    assert [outputs[index].finish_reason for index in range(3)] == ["error"] * 3


def test_llm_gives_the_outputs_of_a_prompt_together():
    with LLM.from_engine(make_engine()) as llm:
        asked = [params(n=3), params(n=1), params(n=2)]
        answers = llm.generate([PROMPT, [5], [5, 6]], asked)
        assert [[one.index for one in answer.outputs] for answer in answers] == [
            [0, 1, 2],
            [0],
            [0, 1],
        ]
        assert [len(answer.prompt_token_ids) for answer in answers] == [18, 1, 2]
        assert answers[0].outputs[1].token_ids == tokens_of_seed(PROMPT, derive_seed(5, 1))
        assert answers[0].outputs[0] is answers[0]
        streamed = llm.generate([PROMPT], params(n=2), stream=True)
        next(streamed)
        streamed.close()
        assert llm.stats().num_used_blocks == 0


def test_the_async_engine_ends_one_output_and_its_iterator_goes_on():
    async def collect(engine):
        outputs = []
        async for output in engine.generate(PROMPT, params(n=2, max_tokens=40), "r"):
            if output.index == 1 and len(output.token_ids) == 3:
                engine.end("r", 1)
                ended.set()
            outputs.append(output)
        return by_index(outputs)

    def step_until_the_command_comes():
        assert inner.stats().generated_tokens < 40 or ended.wait(60)
        return step()

    inner, ended = make_engine(max_model_len=512, num_blocks=256), threading.Event()
    step, inner.step = inner.step, step_until_the_command_comes
    engine = threaded(inner)
    engine.start()
    outputs = asyncio.run(collect(engine))
    engine.stop()
    assert [outputs[index].finish_reason for index in (0, 1)] == ["length", "stop"]
    assert len(outputs[0].token_ids) == 40 > len(outputs[1].token_ids)


def test_leaving_the_async_engine_s_iterator_ends_all_outputs():
    async def leave(engine):
        async with aclosing(engine.generate(PROMPT, params(n=3, max_tokens=20))) as outputs:
            async for output in outputs:
                if output.index == 1:
                    return

    inner = make_engine()
    engine = threaded(inner)
    engine.start()
    asyncio.run(leave(engine))
    engine.stop()
    assert inner.stats().num_used_blocks == 0
