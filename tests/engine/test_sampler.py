"""The sampler against plain rules: exactness, distribution, ties, batch independence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fd_dsa.engine.draws import derive_seed, uniforms
from fd_dsa.engine.sampler import Sampler
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.ops.sampling.token_buffer import NOT_FINITE
from tests.engine.reference_sampler import ref_distribution, ref_token, ref_uniform


def sample(logits, params, seeds=None, positions=None):
    """Tokens of rows of logits, one SamplingParams a row."""
    n = len(logits)
    sampler = Sampler(n)
    for batch_row, one in enumerate(params):
        sampler.set_parameters(batch_row, one, batch_row if seeds is None else seeds[batch_row])
    positions = np.zeros(n, np.int64) if positions is None else np.asarray(positions, np.int64)
    return sampler.sample(logits, np.arange(n), positions)


def random_logits(rng, rows, vocab_size, scale=3.0):
    """Normal logits."""
    return (rng.normal(size=(rows, vocab_size)) * scale).astype(np.float32)


@pytest.mark.parametrize("vocab_size", [1, 7, 511, 512, 513, 4096, 20_000])
def test_greedy_is_the_largest_logit_and_ties_go_to_the_lowest_id(vocab_size):
    logits = random_logits(np.random.default_rng(0), 9, vocab_size).round(0)
    tokens = sample(logits, [SamplingParams(temperature=0)] * 9)
    assert tokens.tolist() == [row.tolist().index(row.max()) for row in logits]


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.7, 5.0, 100.0, 1e300]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 40, 255, 256, 257, 700, 5000, 10**12]),
    top_p=st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-30, 0.01, 0.4, 1.0]),
)


@settings(max_examples=150)
@example([SamplingParams(temperature=0.05, top_p=0.5)] * 3, 50, 1.0, 0, 0.0, 249)
@given(
    params=st.lists(params_strategy, min_size=1, max_size=6),
    vocab_size=st.sampled_from([1, 3, 50, 512, 1000, 6000]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 4.0]),
    decimals=st.sampled_from([0, 2, 9]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_each_row_draws_the_token_of_the_plain_rules(
    params, vocab_size, scale, decimals, masked, seed
):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, len(params), vocab_size, scale).round(decimals)
    # at least one token is left
    logits[:, 1:][rng.random((len(params), vocab_size - 1)) < masked] = -np.inf
    positions = rng.integers(0, 1000, len(params))
    tokens = sample(logits, params, range(seed, seed + len(params)), positions)
    for row, one in enumerate(params):
        uniform, allowed = ref_uniform(seed + row, int(positions[row])), set[int]()
        # equal logits may reach top_p exactly, and rounding decides if one more token is kept
        for top_p in (one.top_p, one.top_p * (1 - 1e-6), min(one.top_p * (1 + 1e-6), 1.0)):
            probabilities = ref_distribution(
                logits[row], one.temperature, one.top_k, top_p, one.min_p
            )
            token, distance = ref_token(probabilities, uniform)
            # rounding may also choose a neighbour, but only one that can be drawn
            neighbours = np.flatnonzero(probabilities) if distance <= 1e-5 else [token]
            allowed.update(map(int, neighbours))
        assert tokens[row] in allowed


@pytest.mark.parametrize(
    ("vocab_size", "num_rows"), [(300, 30), (512, 30), (5000, 30), (60_001, 4)]
)
@pytest.mark.parametrize("top_p", [0.2, 0.8, 0.999])
@pytest.mark.parametrize("scale", [0.0, 0.02, 1.5], ids=["equal", "flat", "curved"])
def test_a_wide_nucleus_is_exact(vocab_size, num_rows, top_p, scale):
    rng = np.random.default_rng(5)
    logits = random_logits(rng, num_rows, vocab_size, scale)
    logits[:, ::7] = -np.inf
    params = SamplingParams(top_p=top_p)
    tokens = sample(logits, [params] * num_rows)
    decided = 0
    for row in range(num_rows):
        probabilities = ref_distribution(logits[row], 1.0, 0, top_p)
        token, distance = ref_token(probabilities, ref_uniform(row, 0))
        if distance > 1e-7:
            decided += 1
            assert tokens[row] == token
    assert decided > 0.6 * num_rows


NOT_ITS_SHARE = {
    "light": lambda column, stride: column % stride == 0,
    "heavy": lambda column, stride: column % stride != 0,
}


@pytest.mark.parametrize("lighter", NOT_ITS_SHARE.values(), ids=NOT_ITS_SHARE)
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_a_nucleus_is_exact_where_every_nth_token_is_unlike_the_others(lighter, top_p):
    vocab_size, rng = 5000, np.random.default_rng(6)
    strides = np.arange(2, 42)
    logits = random_logits(rng, len(strides), vocab_size, 1.0)
    for row, stride in zip(logits, strides, strict=True):
        row[lighter(np.arange(vocab_size), stride)] -= 3
    tokens = sample(logits, [SamplingParams(top_p=top_p)] * len(strides))
    for row, logit_row in enumerate(logits):
        probabilities = ref_distribution(logit_row, 1.0, 0, top_p)
        token, distance = ref_token(probabilities, ref_uniform(row, 0))
        assert tokens[row] == token or distance < 1e-6


@pytest.mark.parametrize("temperature", [1e4, 1e9, 1e300])
def test_a_nucleus_is_of_the_largest_logits_where_their_weights_are_equal(temperature):
    vocab_size, num_rows = 3000, 200
    row = random_logits(np.random.default_rng(7), 1, vocab_size).round(1)
    params = SamplingParams(temperature=temperature, top_p=0.25)
    tokens = sample(np.repeat(row, num_rows, axis=0), [params] * num_rows)
    probabilities = ref_distribution(row[0], temperature, 0, 0.25)
    places = [ref_token(probabilities, ref_uniform(seed, 0)) for seed in range(num_rows)]
    near = [token for token, (_, distance) in zip(tokens, places, strict=True) if distance < 1e-6]
    assert len(near) < 20
    assert (probabilities[tokens] > 0).all()
    assert all(t == p or d < 1e-6 for t, (p, d) in zip(tokens, places, strict=True))


def test_seeds_draw_independently_of_each_other():
    num_seeds = 20_000
    sampler = Sampler(num_seeds)
    for batch_row in range(num_seeds):
        sampler.set_parameters(batch_row, SamplingParams(), batch_row)
    logits = np.zeros((num_seeds, 10), np.float32)
    first = sampler.sample(logits, np.arange(num_seeds), np.zeros(num_seeds, np.int64))
    second = sampler.sample(logits, np.arange(num_seeds), np.ones(num_seeds, np.int64))
    pairs = np.bincount(first * 10 + second, minlength=100)
    expected = num_seeds / 100
    assert ((pairs - expected) ** 2 / expected).sum() < 99 + 6 * np.sqrt(2 * 99)


@given(seed=st.integers(-(2**63), 2**64 - 1), position=st.integers(0, 2**40))
def test_uniform_is_splitmix64(seed, position):
    seeds = np.array([seed & (2**64 - 1)], np.uint64)
    assert uniforms(seeds, np.array([position]))[0] == ref_uniform(seed, position)


def test_derived_seeds_differ_by_number_and_by_engine_seed():
    seeds = {derive_seed(engine, number) for engine in range(20) for number in range(500)}
    assert len(seeds) == 20 * 500


@settings(max_examples=40)
@given(st.lists(params_strategy, min_size=2, max_size=8), st.integers(0, 2**32))
def test_a_row_draws_the_same_alone_and_in_any_batch(params, seed):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, len(params), 3000)
    together = sample(logits, params, seeds=range(len(params)))
    order = rng.permutation(len(params))
    shuffled = sample(logits[order], [params[i] for i in order], seeds=order.tolist())
    alone = [sample(logits[i : i + 1], [one], seeds=[i])[0] for i, one in enumerate(params)]
    assert together.tolist() == alone
    assert shuffled.tolist() == together[order].tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "all -inf"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.1),
    ],
    ids=["greedy", "plain", "top_k", "top_p", "min_p"],
)
def test_an_unusable_row_is_reported_and_the_others_are_sampled(bad, params):
    logits = random_logits(np.random.default_rng(1), 3, 600)
    good = sample(logits, [params] * 3)
    logits[1, 17 if bad != -np.inf else slice(None)] = bad
    tokens = sample(logits, [params] * 3)
    assert tokens[1] == NOT_FINITE
    assert tokens[[0, 2]].tolist() == good[[0, 2]].tolist()
    assert sample(logits[1:2], [params]).tolist() == [NOT_FINITE]


def test_extreme_logits_and_temperatures_do_not_overflow():
    logits = np.array([[-3e38, 3e38, 0.0], [3e38, -3e38, 3e38]], np.float32)
    tokens = sample(logits, [SamplingParams(temperature=2e-5), SamplingParams(top_p=0.4)])
    assert tokens.tolist() == [1, 0]
