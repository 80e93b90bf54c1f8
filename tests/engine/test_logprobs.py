"""Log-probabilities of prompts and outputs, against float64, whatever the engine does meanwhile."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.engine.logprobs import OutputLogprobs, score_tokens
from fd_dsa.engine.output import OutputState, apply_additions
from fd_dsa.engine.sampling_params import SamplingParams
from tests.engine.fakes import VOCAB_SIZE, expected_greedy, make_engine, run_all
from tests.engine.test_engine import letters, run_one

PROMPT = [7, 8, 9]


def ref_logprobs(logits):
    """Log-softmax in float64."""
    values = logits.astype(np.float64)
    return values - values.max() - np.log(np.exp(values - values.max()).sum())


def check_score(score, logits, token_id, num_top):
    """A score against float64."""
    expected = ref_logprobs(logits)
    assert score.logprob == pytest.approx(expected[token_id], abs=1e-5)
    assert score.rank == 1 + sum(value > logits[token_id] for value in logits)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:num_top]
    assert [token for token, _ in score.top] == order
    assert [value for _, value in score.top] == pytest.approx(expected[order], abs=1e-5)


@settings(max_examples=80)
@given(
    num_rows=st.integers(1, 5),
    vocab_size=st.sampled_from([1, 3, 40, 1000, 5000]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    decimals=st.sampled_from([0, 9]),
    seed=st.integers(0, 2**32),
)
def test_scores_are_those_of_a_log_softmax(num_rows, vocab_size, scale, decimals, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(num_rows, vocab_size)) * scale).astype(np.float32).round(decimals)
    tokens = rng.integers(0, vocab_size, num_rows)
    num_top = rng.integers(0, 21, num_rows).tolist()
    scores = score_tokens(logits, tokens, num_top)
    for row, score in enumerate(scores):
        check_score(score, logits[row], int(tokens[row]), num_top[row])


def test_rows_that_are_not_finite_have_no_score_and_excluded_tokens_minus_infinity():
    logits = np.zeros((4, 50), np.float32)
    logits[0, 3] = np.nan
    logits[1] = -np.inf
    logits[2, 5] = -np.inf
    logits[3, 7] = np.inf
    scores = score_tokens(logits, np.array([3, 3, 5, 7]), [2, 2, 2, 2])
    assert [score is None for score in scores] == [True, True, False, True]
    assert scores[2].logprob == -math.inf
    assert scores[2].rank == 50


def params(**fields):
    """Greedy parameters, 12 tokens."""
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields})


def check_output(output, runner, num_top):
    """The shown scores of an output, token by token."""
    history = list(output.prompt_token_ids)
    offset = 0
    for entry, token_id in zip(output.logprobs, output.token_ids, strict=False):
        assert entry.token_id == token_id
        assert entry.text_offset == offset
        check_score(entry.score, runner.logits_after(history), token_id, num_top)
        history.append(token_id)
        offset += len(letters([token_id]))


def check_prompt(output, runner, num_top):
    """The scores of a prompt."""
    prompt = output.prompt_token_ids
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry.token_id == prompt[position]
        assert entry.text_offset == len(letters(prompt[:position]))
        check_score(entry.score, runner.logits_after(prompt[:position]), prompt[position], num_top)


def test_scores_are_of_the_models_own_distribution():
    changed = params(logprobs=5, temperature=3.0, logit_bias={5: 50.0}, frequency_penalty=2.0)
    outputs = run_one(make_engine(), PROMPT, changed)
    assert len(outputs[-1].logprobs) == 12
    check_output(outputs[-1], make_engine().runner, 5)
    assert [entry for output in outputs for entry in output.new_logprobs] == outputs[-1].logprobs
    assert [len(output.logprobs) for output in outputs] == list(range(1, 13))
    assert run_one(make_engine(), PROMPT, params())[-1].logprobs is None


requests = st.lists(
    st.tuples(
        st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=30),
        st.none() | st.integers(0, 20),
        st.none() | st.integers(0, 20),
        st.integers(1, 10),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=50)
@given(
    requests=requests,
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 20),
    spare_blocks=st.integers(0, 12),
    caching=st.booleans(),
)
def test_scores_survive_chunks_cached_prefixes_and_preemption(
    requests, max_num_seqs, budget, spare_blocks, caching
):
    longest = max(len(prompt) + num_tokens for prompt, _, _, num_tokens in requests)
    engine = make_engine(
        num_blocks=-(-longest // 4) + spare_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
    )
    runner = engine.runner
    widest = []
    execute = runner.execute_model
    runner.execute_model = lambda indices: (widest.append(len(indices)), execute(indices))[1]
    # twice, so that the second time prefixes are cached
    for turn in range(2):
        for index, (prompt, logprobs, prompt_logprobs, max_tokens) in enumerate(requests):
            fields = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
            engine.add_request(f"{turn}-{index}", prompt, params(max_tokens=max_tokens, **fields))
        for name, outputs in run_all(engine).items():
            prompt, logprobs, prompt_logprobs, max_tokens = requests[int(name.split("-")[1])]
            assert outputs[-1].token_ids == expected_greedy(prompt, max_tokens, eos=None)
            if logprobs is None:
                assert outputs[-1].logprobs is None
            else:
                assert len(outputs[-1].logprobs) == max_tokens
                check_output(outputs[-1], runner, logprobs)
            if prompt_logprobs is None:
                assert outputs[-1].prompt_logprobs is None
            else:
                assert outputs[-1].num_cached_tokens == 0
                check_prompt(outputs[0], runner, prompt_logprobs)
    assert max(widest) <= max_num_seqs


@pytest.mark.parametrize("first_ends", [False, True])
@pytest.mark.parametrize("prompt", [[7, 8, 9, 10], [*range(2, 25)]])
def test_every_output_of_a_request_has_the_scores_of_its_prompt(prompt, first_ends):
    """Outputs of one token, whose prompt is cached and scored by two rows a step.

    The copies of the outputs are those of a process that gets only what each step adds.
    """
    engine = make_engine(max_num_seqs=2)
    run_one(engine, prompt, params())
    engine.add_request("n", prompt, params(n=3, max_tokens=1, prompt_logprobs=2))
    assert engine.step() == []
    ended = engine.finish_output("n", 0) if first_ends else []
    outputs = run_all(engine)["n"]
    assert sorted(output.index for output in ended + outputs) == [0, 1, 2]
    copies = [OutputState("n", index, prompt) for index in range(3)]
    for output in outputs:
        _, *additions = output.additions()
        check_prompt(output, engine.runner, 2)
        check_prompt(apply_additions(copies, *additions), engine.runner, 2)
    assert [output.brings_prompt_logprobs for output in outputs] == [True] + [False] * (
        len(outputs) - 1
    )


def test_a_prompt_with_unusable_logits_ends_its_request_alone():
    for chunk in (2, 16):
        # rows enough to read the whole prompt in the step in which both requests sample
        engine = make_engine(max_num_batched_tokens=chunk, max_num_seqs=8)
        engine.runner.nan_after = 9
        engine.add_request("bad", [7, 9, 8, 5, 6], params(prompt_logprobs=0))
        engine.add_request("good", [7, 10], params())
        outputs = run_all(engine)
        assert outputs["bad"][-1].finish_reason == "error"
        assert "not finite" in str(outputs["bad"][-1].error)
        assert outputs["bad"][-1].prompt_logprobs is None
        # what follows the poison in the good request may end it too, not before
        assert outputs["good"][0].token_ids == expected_greedy([7, 10], 1, eos=None)
        assert engine.stats().num_used_blocks == 0


def test_scores_of_a_cut_stop_string_are_never_shown_and_held_ones_come_with_their_text():
    text = letters(expected_greedy(PROMPT, 12, eos=None))
    outputs = run_one(make_engine(), PROMPT, params(logprobs=0, stop=text[4:7]))
    assert outputs[-1].text == text[:4]
    assert [len(output.new_logprobs) for output in outputs] == [1, 1, 1, 1, 0, 0, 0]
    assert len(outputs[-1].token_ids) == 7
    kept = params(logprobs=0, stop=text[4:7], include_stop_str_in_output=True)
    outputs = run_one(make_engine(), PROMPT, kept)
    assert [len(output.new_logprobs) for output in outputs] == [1, 1, 1, 1, 0, 0, 3]
    # a stop string that does not come after all
    outputs = run_one(make_engine(), PROMPT, params(logprobs=0, stop=text[4:7] + "!"))
    assert [len(output.new_logprobs) for output in outputs[:8]] == [1, 1, 1, 1, 0, 0, 0, 4]
    for output in outputs:
        assert sum(len(letters([e.token_id])) for e in output.logprobs) == len(output.text)


def test_tokens_of_one_character_are_shown_together():
    stream = OutputLogprobs()
    score = score_tokens(np.zeros((1, 3), np.float32), np.array([0]), [0])[0]
    shown = []
    # an emoji of three tokens after a letter, then a token without text, then a letter
    for num_chars in (1, 0, 0, 1, 0, 1):
        stream.append(0, score, num_chars)
        shown.append(len(stream.show(num_chars, False, False)))
    assert shown == [1, 0, 0, 3, 0, 2]
    assert [entry.text_offset for entry in stream.shown] == [0, 1, 1, 1, 2, 2]
    stream.append(0, score, 0)
    assert stream.show(0, False, False) == []
    assert len(stream.show(0, True, False)) == 1
