"""Penalties, bias, bans and min_p against the rules written plainly, in batches that mix them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.engine.logit_rules import BadWords, LogitRules, TokenCounts
from fd_dsa.engine.sampler import Sampler
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.ops.sampling.token_buffer import NO_TOKEN, NOT_FINITE
from tests.engine.reference_sampler import ref_adjusted, ref_distribution, ref_token, ref_uniform

VOCAB_SIZE = 77
END_IDS = [1, 40, 76]
token_ids = st.integers(0, VOCAB_SIZE - 1)


class AllowedTokens:
    """A grammar whose mask is a set of tokens; bits beyond the vocabulary are set too."""

    def __init__(self, allowed):
        self.allowed = allowed
        self.is_finished = False

    def fill_bitmask(self, bitmask):
        bits = np.ones(32 * len(bitmask), np.uint8)
        bits[:VOCAB_SIZE] = [token in self.allowed for token in range(VOCAB_SIZE)]
        bitmask[:] = np.packbits(bits, bitorder="little").view(np.int32)


@st.composite
def rows(draw):
    """Parameters, history and bans of one row; some rows have no rule."""
    output = draw(st.lists(st.integers(0, 5) | token_ids, max_size=12))
    has_rules = draw(st.booleans())
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 3.0, 1e300])),
        top_k=draw(st.sampled_from([0, 1, 5, 30])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-3, 0.2, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5])) if has_rules else 1.0,
        frequency_penalty=draw(st.sampled_from([0.0, 2.0, -1.5])) if has_rules else 0.0,
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -2.0])) if has_rules else 0.0,
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-100, 100), max_size=5))
        if has_rules
        else None,
        bad_words_token_ids=draw(st.lists(token_ids, max_size=4)) if has_rules else None,
        min_tokens=draw(st.sampled_from([0, 3, 14])) if has_rules else 0,
        max_tokens=20,
    )
    sequences = draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=4))
    allowed = draw(st.none() | st.sets(token_ids, min_size=1)) if has_rules else None
    prompt = draw(st.lists(token_ids, min_size=1, max_size=8))
    bad = [tuple(sequence) for sequence in sequences] if has_rules else []
    return params, prompt, output, bad, allowed, has_rules


def check_row(token, logits, row, seed):
    """The token is the one of the plain rules, but for draws within rounding."""
    params, prompt, output, bad, allowed, _ = row
    adjusted = ref_adjusted(logits, params, prompt, output, bad, END_IDS, allowed)
    if np.isneginf(adjusted).all():
        assert token == NO_TOKEN
        return
    if params.temperature == 0:
        assert adjusted[token] >= adjusted.max() - 1e-5
        return
    scaled = adjusted.astype(np.float32)
    probabilities = ref_distribution(
        scaled, params.temperature, params.top_k, params.top_p, params.min_p
    )
    expected, distance = ref_token(probabilities, ref_uniform(seed, len(output)))
    if distance > 1e-5:
        assert token == expected
    else:
        assert probabilities[token] > 0


@settings(max_examples=100)
@given(batch=st.lists(rows(), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_rows_that_mix_all_rules_draw_what_the_plain_rules_draw(batch, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(len(batch), VOCAB_SIZE)) * 3).astype(np.float32)
    before = logits.copy()
    sampler = Sampler(len(batch))
    for batch_row, (params, prompt, output, bad, allowed, has_rules) in enumerate(batch):
        grammar = None if allowed is None else AllowedTokens(allowed)
        bans = BadWords((), bad)
        rules = LogitRules(params, prompt, output, bans, END_IDS, grammar) if has_rules else None
        sampler.set_parameters(batch_row, params, seed + batch_row, rules)
    positions = np.array([len(row[2]) for row in batch])
    tokens = sampler.sample(logits, np.arange(len(batch)), positions)
    for batch_row, row in enumerate(batch):
        check_row(int(tokens[batch_row]), logits[batch_row], row, seed + batch_row)
    assert (logits == before).all()


@given(st.lists(token_ids, max_size=20), st.lists(st.lists(token_ids, max_size=90), max_size=5))
def test_counts_follow_a_growing_output(prompt, pieces):
    output = []
    counts = TokenCounts(prompt, output)
    for piece in [[], *pieces]:
        output.extend(piece)
        ids, found = counts.update()
        expected = {token: output.count(token) for token in {*prompt, *output}}
        assert dict(zip(ids.tolist(), found.tolist(), strict=True)) == expected
        assert len(ids) == len(expected)


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_penalty_beyond_float32_does_not_spoil_a_row(penalty):
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    sampler = Sampler(1)
    sampler.set_parameters(0, params, 0, LogitRules(params, [0, 1], []))
    logits = np.array([[1.0, -1.0, 0.5]], np.float32)
    token = sampler.sample(logits, np.array([0]), np.array([0]))[0]
    assert token == (0 if penalty < 1 else 2)


def test_unusable_logits_are_told_from_rules_that_leave_nothing():
    params = SamplingParams(bad_words_token_ids=[0, 1, 2])
    sampler = Sampler(2)
    for batch_row in (0, 1):
        sampler.set_parameters(batch_row, params, 0, LogitRules(params, [0], []))
    logits = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0]], np.float32)
    tokens = sampler.sample(logits, np.array([0, 1]), np.array([0, 0]))
    assert tokens.tolist() == [NO_TOKEN, NOT_FINITE]


def test_rows_without_rules_draw_the_same_beside_rows_that_have_some():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 500)).astype(np.float32)
    plain = SamplingParams(temperature=0.9)
    biased = SamplingParams(temperature=0.9, logit_bias={7: 3.0})
    alone, mixed = Sampler(6), Sampler(6)
    for batch_row in range(6):
        alone.set_parameters(batch_row, plain, batch_row)
        rules = LogitRules(biased, [1], []) if batch_row % 2 else None
        mixed.set_parameters(batch_row, biased if batch_row % 2 else plain, batch_row, rules)
    rows, zeros = np.arange(6), np.zeros(6, np.int64)
    expected = alone.sample(logits, rows, zeros)
    assert (mixed.sample(logits, rows, zeros)[::2] == expected[::2]).all()
    # the batch row's next request has no rules
    for batch_row in range(6):
        mixed.set_parameters(batch_row, plain, batch_row)
    assert (mixed.sample(logits, rows, zeros) == expected).all()
