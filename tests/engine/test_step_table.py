"""Chunks by a table of measured step times: they fill a size, and keep the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.engine.step_times import SMALLEST_CHUNK, StepShape, StepTable, StepTimeModel

SIZES, TOPK, FAR = (32, 64, 128, 256, 512, 1024, 2048), 2048, 160_000
BUDGET = 8192
# first margin of the model
MARGIN = 1.3


def table(seconds: Callable[[int], float], long: float = 1.0, far: float = 1.0) -> StepTable:
    """A table by a function of the number of tokens, and factors of long steps and contexts."""
    short = [seconds(size) for size in SIZES]
    near = [long * one for one in short]
    return StepTable(SIZES, TOPK, short, (TOPK, near), (FAR, [far * one for one in near]))


def gpu_seconds(tokens: int) -> float:
    """A device on which a step of 2,048 tokens takes 130 ms."""
    return 0.030 + tokens * 0.1 / 2048


TABLE = table(gpu_seconds, long=1.5, far=3.0)
seconds = st.floats(1e-4, 10)


@st.composite
def tables(draw: st.DrawFn) -> StepTable:
    """Draw a table whose times grow with the number of tokens, from short to long steps."""
    size = {"min_size": len(SIZES), "max_size": len(SIZES)}
    columns = [sorted(draw(st.lists(seconds, **size))) for _ in range(3)]
    short, near, far = accumulate(columns, lambda one, more: list(map(max, one, more)))
    return StepTable(SIZES, TOPK, short, (TOPK, near), (FAR, far))


shapes = st.builds(
    StepShape, st.integers(1, 256), st.just(0), st.just(0), max_row_len=st.integers(1, 8000)
)


@given(tables(), shapes, st.integers(0, 100_000), seconds)
def test_a_chunk_keeps_a_target_that_the_smallest_one_keeps(
    table: StepTable, shape: StepShape, context: int, target_s: float
) -> None:
    times = StepTimeModel(BUDGET, table)
    chunk = times.longest_chunk(shape, context, target_s)
    assert SMALLEST_CHUNK <= chunk <= BUDGET
    smallest = table.seconds(shape.with_chunk(SMALLEST_CHUNK, context))
    whole = table.seconds(shape.with_chunk(chunk, context))
    assert whole <= (target_s if smallest <= target_s else 1.5 * smallest)
    # no chunk pads its step, unless a full one would be of the other kind and take longer
    tokens = shape.num_decode_tokens + chunk
    assert tokens in SIZES or tokens > SIZES[-1] or chunk == SMALLEST_CHUNK


@given(tables(), shapes, st.integers(0, 100_000), st.tuples(seconds, seconds))
def test_a_longer_target_shortens_no_chunk(
    table: StepTable, shape: StepShape, context: int, targets: tuple[float, float]
) -> None:
    times = StepTimeModel(BUDGET, table)
    smallest = table.seconds(shape.with_chunk(SMALLEST_CHUNK, context))
    few, many = (times.longest_chunk(shape, context, target_s) for target_s in sorted(targets))
    # a target that cannot be kept leaves chunks half as long again
    assert few <= many or min(targets) < smallest


@given(seconds, seconds, st.integers(1, 256))
def test_if_all_sizes_take_the_same_time_a_chunk_fills_the_largest(
    host_s: float, target_s: float, rows: int
) -> None:
    times = StepTimeModel(BUDGET, table(lambda _: host_s))
    assert times.longest_chunk(StepShape(rows), 0, target_s) >= SIZES[-1] - rows


@given(
    steps=st.lists(
        st.tuples(seconds, st.integers(0, 9), st.integers(0, BUDGET), st.integers(0, 1 << 18)),
        max_size=40,
    ),
    target_s=seconds,
)
def test_any_times_give_a_chunk_that_fits_a_step(
    steps: list[tuple[float, int, int, int]], target_s: float
) -> None:
    times = StepTimeModel(BUDGET, TABLE)
    for taken, rows, tokens, context in steps:
        shape = StepShape(rows).with_chunk(tokens, context)
        if shape.num_tokens:
            times.record(taken, shape)
        first = times.longest_chunk(StepShape(rows), context, target_s)
        assert SMALLEST_CHUNK <= first <= BUDGET
        more = times.longest_chunk(StepShape(rows).with_chunk(first, context), context, target_s)
        assert 0 <= more <= BUDGET


@pytest.mark.parametrize(("target_ms", "size"), [(200, 2048), (110, 1024), (72, 512), (50, 128)])
def test_a_chunk_fills_the_largest_size_within_target_and_margin(target_ms: int, size: int) -> None:
    times = StepTimeModel(2048, TABLE)
    for rows in (1, 17):
        assert times.longest_chunk(StepShape(rows), 0, target_ms / 1e3) == size - rows


def test_rows_past_the_selection_and_long_contexts_shorten_chunks() -> None:
    times = StepTimeModel(2048, TABLE)
    cases = (StepShape(8), 0), (StepShape(8, max_row_len=5000), 0), (StepShape(8), 100_000)
    chunks = [times.longest_chunk(shape, context, 0.2) for shape, context in cases]
    assert chunks == [2040, 1016, 248]


def test_several_chunks_of_a_step_keep_the_target_together() -> None:
    """A prompt with a long context has no room left in a step that a short one fills."""
    times, shape, parts = StepTimeModel(2048, TABLE), StepShape(8), []
    for length, context in ((100, 0), (700, 0), (5000, 50_000), (5000, 0)):
        parts.append(min(times.longest_chunk(shape, context, 0.2), length))
        shape = shape.with_chunk(parts[-1], context)
    assert parts[:2] == [100, 700] and 0 < parts[2] < 1024 - 808 + 1
    assert MARGIN * times.expected(shape) <= 0.2
    # the rest of a size is free
    assert shape.num_tokens in SIZES and parts[3] == 0


def test_short_prompts_share_a_step_whose_time_they_do_not_change() -> None:
    """No step keeps the target, but all sizes take the same time."""
    times, shape = StepTimeModel(2048, table(lambda _: 0.107)), StepShape(32)
    for _ in range(20):
        assert times.longest_chunk(shape, 0, 0.05) == 2048 - shape.num_tokens
        shape = shape.with_chunk(30, 0)


def test_a_factor_of_each_kind_follows_measured_steps() -> None:
    times = StepTimeModel(2048, TABLE)
    long = StepShape(8, 1016, max_row_len=4096)
    for _ in range(30):
        times.record(2 * TABLE.seconds(long), long)
    assert times.expected(long) == pytest.approx(2 * TABLE.seconds(long), rel=0.01)
    # all sizes of a kind follow, and none of the other kind
    smaller = long._replace(num_prefill_tokens=56)
    assert times.expected(smaller) == pytest.approx(2 * TABLE.seconds(smaller), rel=0.01)
    short = long._replace(max_row_len=1016)
    assert times.expected(short) == TABLE.seconds(short)


def test_one_pause_does_not_stay() -> None:
    times, shape = StepTimeModel(2048, TABLE), StepShape(8, 2040, max_row_len=2040)
    times.record(30.0, shape)
    for _ in range(12):
        times.record(TABLE.seconds(shape), shape)
    assert times.expected(shape) == pytest.approx(TABLE.seconds(shape), rel=0.05)


def test_a_step_past_the_largest_size_takes_no_shorter_than_it() -> None:
    times = StepTimeModel(BUDGET, TABLE)
    largest = StepShape(8, 2040, max_row_len=2040)
    expected = [
        times.expected(replace_tokens(largest, tokens)) for tokens in range(2040, BUDGET, 100)
    ]
    assert expected == sorted(expected)
    assert times.longest_chunk(StepShape(8), 0, 1.0) > 2040


def replace_tokens(shape: StepShape, num_prefill_tokens: int) -> StepShape:
    """The sizes of a step with other prefill tokens."""
    return shape._replace(num_prefill_tokens=num_prefill_tokens)


def test_a_table_with_one_context_of_long_steps_has_one_time_for_all() -> None:
    one = replace(TABLE, far=TABLE.near)
    shape = StepShape(8, 100, 90_000, 90_100)
    assert one.seconds(shape) == TABLE.near[1][2]
