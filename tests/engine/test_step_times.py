"""The table of step times: cautious at first, soon close to what fits, not misled for long."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fd_dsa.engine.step_times import SMALLEST_CHUNK, StepShape, StepTimeModel

Model = Callable[[int, int, int], float]


def small_cpu(rows: int, tokens: int, context: int) -> float:
    """A processor: little fixed cost, tokens and keys count, long chunks a little more."""
    prompt = 0.003 + 0.00035 * tokens * (1 + context / 4000) + 6e-7 * tokens**2
    return 0.009 + 0.001 * rows + (prompt if tokens else 0)


def large_gpu(rows: int, tokens: int, context: int) -> float:
    """A device: steps with a prompt have a fixed cost of their own, tokens cost little."""
    prompt = 0.008 + 0.00002 * tokens * (1 + context / 70_000)
    return 0.03 + 0.0001 * rows + (prompt if tokens else 0)


def longest_chunk(times: StepTimeModel, rows: int, context: int, target_s: float) -> int:
    """The first chunk of a step beside rows that decode."""
    return times.longest_chunk(StepShape(rows), context, target_s)


class Host:
    """A table that is fed with the times of a model.

    Args:
        model: seconds by decode tokens, prompt tokens and context.
        budget: most tokens of a step.
        noise: share by which a time may be off, either way.
    """

    def __init__(self, model: Model, budget: int = 512, noise: float = 0.0) -> None:
        self.times = StepTimeModel(budget)
        self.model = model
        self._budget = budget
        self._noise = noise
        self._random = Random(0)

    def step(self, rows: int, tokens: int = 0, context: int = 0) -> float:
        """Run a step; returns its seconds."""
        factor = 1 + self._noise * self._random.uniform(-1, 1)
        seconds = factor * self.model(rows, tokens, context)
        self.times.record(seconds, StepShape(rows, tokens, context))
        return seconds

    def prompt(self, length: int, limit_s: float, rows: int = 1) -> list[tuple[int, float]]:
        """Compute a prompt beside streams; tokens and seconds of its steps."""
        steps, context = [], 0
        while context < length:
            chunk = longest_chunk(self.times, rows, context, limit_s)
            chunk = min(chunk, length - context, self._budget - rows)
            steps.append((chunk, self.step(rows, chunk, context)))
            context += chunk
        return steps


def test_nothing_is_known_at_first() -> None:
    assert longest_chunk(StepTimeModel(5), 1, 0, 1e6) == 5
    times = StepTimeModel(512)
    assert times.expected(StepShape(1)) == times.expected(StepShape(1, 16)) == math.inf
    assert longest_chunk(times, 1, 0, 1e6) == SMALLEST_CHUNK


@pytest.mark.parametrize("first", [0, 20, 64, 512])
@pytest.mark.parametrize(
    ("model", "limit_s", "length"),
    [(small_cpu, 0.2, 8000), (small_cpu, 0.05, 2000), (large_gpu, 0.2, 60_000)],
)
def test_a_fresh_host_keeps_the_limit(
    model: Model, limit_s: float, length: int, first: int
) -> None:
    host = Host(model, budget=8192 if model is large_gpu else 512)
    if first:
        host.step(0, first)
        host.step(1)
    steps = host.prompt(length, limit_s)
    late = [seconds for tokens, seconds in steps if seconds > limit_s and tokens > SMALLEST_CHUNK]
    # one of the first steps may try the next size and find that it does not fit
    assert len(late) <= 1 and all(seconds < 1.5 * limit_s for seconds in late)
    assert steps[0][1] <= limit_s


@pytest.mark.parametrize(("model", "limit_s"), [(small_cpu, 0.2), (large_gpu, 0.2)])
def test_chunks_come_close_to_the_limit(model: Model, limit_s: float) -> None:
    budget = 8192 if model is large_gpu else 512
    host = Host(model, budget, noise=0.03)
    host.step(1)
    for _ in range(4):
        steps = host.prompt(8000, limit_s)
    tokens, context = steps[len(steps) // 2][0], 4000
    fits = [size for size in range(16, budget, 16) if model(1, size, context) <= limit_s]
    assert tokens >= 0.4 * max(fits)


def test_noise_keeps_99_of_100_steps_within_the_limit() -> None:
    host = Host(small_cpu, noise=0.5)
    host.step(1)
    host.prompt(8000, 0.2)
    seconds = sorted(s for _ in range(10) for _, s in host.prompt(8000, 0.2))
    assert seconds[int(0.99 * len(seconds))] <= 0.2


@pytest.mark.parametrize("model", [small_cpu, large_gpu])
def test_where_nothing_fits_prompts_go_on_and_cost_streams_little(model: Model) -> None:
    host = Host(model)
    host.step(1)
    steps = host.prompt(8000, 0.001)
    assert steps[0][0] == SMALLEST_CHUNK
    context = 0
    for tokens, seconds in steps:
        assert seconds <= 2 * model(1, SMALLEST_CHUNK, context)
        context += tokens
    # a device whose steps are mostly fixed cost computes prompts as fast as it can
    if model is large_gpu:
        assert max(tokens for tokens, _ in steps) >= 256


def test_a_slow_first_step_does_not_spoil_later_chunks() -> None:
    """A server's first prompt is short and slow; where contexts grow its time was multiplied."""
    host = Host(small_cpu)
    host.times.record(20 * small_cpu(0, 4, 0), StepShape(0, 4))
    host.step(1)
    for _ in range(2):
        steps = host.prompt(8000, 0.2)
        assert sum(seconds > 0.2 for _, seconds in steps) <= 1
        for context in range(0, 8000, 500):
            few, many = (
                host.times.expected(StepShape(1, size, context)) for size in (SMALLEST_CHUNK, 64)
            )
            assert few <= many


def test_short_chunks_that_seemed_to_cost_nothing_do_not_allow_a_long_one() -> None:
    """Steps that only decode were slow for a moment, so what prompts added was next to nothing."""
    host = Host(small_cpu)
    for _ in range(20):
        host.times.record(0.027, StepShape(1))
    for tokens in (16, 32):
        host.times.record(0.028, StepShape(1, tokens))
    assert host.times.expected(StepShape(1, 512, 48)) < 0.1
    assert all(seconds <= 0.2 for _, seconds in host.prompt(8000, 0.2))


def test_one_pause_does_not_stay() -> None:
    host = Host(small_cpu)
    host.step(1)
    before = host.prompt(8000, 0.2)
    chunk = longest_chunk(host.times, 1, 0, 0.2)
    host.times.record(30.0, StepShape(1, chunk))
    host.prompt(8000, 0.2)
    after = host.prompt(8000, 0.2)
    assert sum(s for _, s in after) < 1.1 * sum(s for _, s in before)


def test_a_host_that_was_slow_is_tried_again() -> None:
    host = Host(lambda *shape: 10 * small_cpu(*shape))
    host.step(1)
    host.prompt(4000, 0.2)
    host.model = small_cpu
    for _ in range(4):
        host.prompt(8000, 0.2)
    assert longest_chunk(host.times, 1, 0, 0.2) >= 64


def test_rows_and_contexts_that_grow_shorten_chunks() -> None:
    host = Host(small_cpu)
    for rows in (1, 64):
        host.step(rows)
        for _ in range(2):
            host.prompt(8000, 0.2, rows)
    chunks = [
        longest_chunk(host.times, rows, context, 0.2)
        for rows, context in ((1, 0), (1, 7000), (64, 7000))
    ]
    assert chunks[0] > chunks[1] > chunks[2]


def test_a_long_context_that_nothing_is_known_of_counts_in_proportion() -> None:
    host = Host(small_cpu)
    host.step(1)
    host.step(1, 64, 0)
    known = host.times.expected(StepShape(1, 64, 0))
    assert host.times.expected(StepShape(1, 64, 8000)) >= 8 * (known - 0.01)
    assert longest_chunk(host.times, 1, 60_000, 0.2) == SMALLEST_CHUNK


@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 1e4),
            st.integers(0, 6),
            st.integers(0, 40),
            st.integers(0, 1 << 22),
        ),
        max_size=60,
    ),
    limit_s=st.floats(1e-3, 60),
)
# a ratio of times that overflowed
@example(steps=[(5e-324, 0, 40, 0), (1.0, 2, 0, 0), (1e4, 2, 40, 2048)], limit_s=0.2)
def test_any_times_give_a_chunk_that_fits_a_step(
    steps: list[tuple[float, int, int, int]], limit_s: float
) -> None:
    times = StepTimeModel(40)
    for seconds, rows, tokens, context in steps:
        if rows + tokens:
            times.record(seconds, StepShape(rows, tokens, context))
        assert times.expected(StepShape(rows, tokens or 1, context)) >= 0
        assert SMALLEST_CHUNK <= longest_chunk(times, rows, context, limit_s) <= 40
