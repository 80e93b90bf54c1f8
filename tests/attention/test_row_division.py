"""The indexer's rows divided among ranks: parts, and selections equal to those of one rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("paddle", reason="the CPU's products are Paddle's")

from fd_dsa.attention import DSAAttentionBackend, step_plan
from fd_dsa.attention.row_division import RowDivision, equal_parts, scored_keys
from fd_dsa.distributed import Group
from fd_dsa.distributed.host import HostGroup
from fd_dsa.environment import DEFAULT_DIVIDED_MIN_TOKENS, divided_min_tokens
from fd_dsa.errors import ConfigError
from tests.attention.harness import Sizes, Step, rows_of, world_of
from tests.distributed.divided_selection import SMALL, select
from tests.distributed.groups import on_ranks
from tests.kernel_memory import KernelMemory
from tests.strategies import StepBatch, examples, step_batches

VARIABLE = "FD_DSA_DIVIDED_MIN_TOKENS"
SIZES = (2, 3, 4, 8)


class Alone(Group):
    """A rank whose group keeps the rows that it has selected, and has no others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.gathered: list[tuple[int, int]] = []

    def all_reduce(self, tensor: Any) -> Any:
        raise NotImplementedError

    def all_gather(self, tensor: Any) -> Any:
        raise NotImplementedError

    def all_gather_rows(self, rows: Any, bounds: Sequence[int]) -> None:
        self.gathered.append((bounds[self.rank], bounds[self.rank + 1]))

    def barrier(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


@given(st.lists(st.integers(0, 50), max_size=40), st.sampled_from(SIZES))
def test_parts_are_as_equal_as_whole_costs_allow(costs: list[int], size: int) -> None:
    bounds = equal_parts(np.array(costs, np.int64), size).tolist()
    assert len(bounds) == size + 1
    assert (bounds[0], bounds[-1]) == (0, len(costs))
    assert bounds == sorted(bounds)
    parts = [sum(costs[begin:end]) for begin, end in pairwise(bounds)]
    assert max(parts) <= sum(costs) / size + max(costs, default=0)


Row = tuple[int, int, int]
ROW = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))


@given(st.lists(ROW, min_size=1, max_size=6), st.integers(1, 40))
def test_a_token_past_the_selection_has_a_score_for_each_key(rows: list[Row], topk: int) -> None:
    lengths = tuple(np.array(rows, np.int32).T)
    in_row, keys = scored_keys(lengths, topk)
    tokens = [(i, done + i + 1) for _, done, new in rows for i in range(new)]
    assert in_row.tolist() == [i for i, _ in tokens]
    assert keys.tolist() == [count if count > topk else 0 for _, count in tokens]


def divided(
    rows: list[Row], size: int = 2, group: Group | None = None, has_lengths: bool = True
) -> list[int] | None:
    """Bounds of a step with two tokens of padding, of an indexer that selects 8 keys."""
    division = RowDivision(group or Alone(0, size), 8)
    lengths = tuple(np.array(rows, np.int32).reshape(-1, 3).T)
    step: Any = SimpleNamespace(
        num_prefill_tokens=int(lengths[0].sum()),
        max_seqlen_k=int((lengths[1] + lengths[2]).max()),
        position_ids=np.zeros(int(lengths[2].sum()) + 2),
    )
    division.begin_step(step, lengths if has_lengths else None)
    assert division.part(9) == ((0, 9) if division.bounds is None else tuple(division.bounds[:2]))
    return division.bounds


def test_parts_begin_at_whole_tiles_and_the_last_one_has_the_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "70")
    rows = [(3, 0, 3), (64, 100, 64), (0, 20, 6)]
    # of 8,621 scores 1,736, 1,992, 2,248 and 2,504 in four tiles, and 141 in the last row
    assert divided(rows, 2) == [0, 3 + 32, 75]
    assert divided(rows, 4) == [0, 3 + 16, 3 + 32, 3 + 48, 75]
    # more ranks than tiles
    bounds = divided(rows, 8)
    assert bounds is not None and len(set(bounds)) < 9


def test_short_steps_and_steps_without_prompts_are_not_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [(64, 100, 64), (0, 20, 6)]
    monkeypatch.setenv(VARIABLE, "70")
    assert divided(rows) is not None
    assert divided(rows, has_lengths=False) is None
    assert divided([(0, 100, 64), (0, 20, 6)]) is None
    monkeypatch.setenv(VARIABLE, "71")
    assert divided(rows) is None
    monkeypatch.setenv(VARIABLE, "1")
    assert divided([(8, 0, 8)]) is None
    monkeypatch.setenv(VARIABLE, "0")
    assert divided(rows) is None


def test_a_group_that_gathers_no_rows_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(VARIABLE, "1")
    group = Alone(0, 2)
    group.gathers_rows = False
    assert divided([(64, 100, 64)], group=group) is None
    said = "selection of prompts past 8 tokens: on every rank, because the ranks cannot gather rows"
    assert caplog.messages == [said]


def test_the_threshold_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert divided_min_tokens() == DEFAULT_DIVIDED_MIN_TOKENS
    monkeypatch.setenv(VARIABLE, " 3 ")
    assert divided_min_tokens() == 3
    monkeypatch.setenv(VARIABLE, "-1")
    with pytest.raises(ConfigError, match=f"{VARIABLE}: got '-1', allowed: a number of tokens, 0"):
        divided_min_tokens()
    monkeypatch.setenv(VARIABLE, "9" * 5000)
    with pytest.raises(ConfigError, match=f"{VARIABLE}: got '9.* max 18 digits"):
        divided_min_tokens()


def run(batch: StepBatch, sizes: Sizes, group: HostGroup | None) -> Step:
    """A step of two layers through the backend of a rank."""
    world = world_of(batch, sizes)
    world.backend = DSAAttentionBackend(world.backend.config, group=group)
    padded = batch.num_padded_tokens or batch.num_tokens
    return world.run(rows_of(batch), padded - batch.num_tokens)


@examples(20, 300)
@given(step_batches(min_rows=1, block_size=16, max_len=90), st.sampled_from(SIZES))
def test_ranks_on_a_cpu_select_and_attend_as_one(
    monkeypatch: pytest.MonkeyPatch, batch: StepBatch, size: int
) -> None:
    # several tiles, which the ranks divide
    monkeypatch.setattr(step_plan, "SCORE_TILE_VALUES", 2000)
    monkeypatch.setenv(VARIABLE, "1")
    sizes = Sizes(8, layers=2)
    alone = run(batch, sizes, None)
    for found in on_ranks(size, lambda group: run(batch, sizes, group)):
        for name in ("slots", "outputs"):
            pairs = zip(getattr(found, name), getattr(alone, name), strict=True)
            for one, other in pairs:
                np.testing.assert_array_equal(one, other)


@pytest.mark.triton
@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_on_a_device_select_as_one(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    wanted, ends = select(kernel_memory, SMALL, None), []
    for rank in range(size):
        group = Alone(rank, size)
        slots = select(kernel_memory, SMALL, group)
        [(begin, end)] = group.gathered
        np.testing.assert_array_equal(slots[begin:end], wanted[begin:end])
        # rows of other parts are left to other ranks
        others = np.delete(slots, np.s_[begin:end], axis=0)
        assert (others == others.flat[0]).all() and others.flat[0] < -1
        ends.append((begin, end))
    begins = [begin for begin, _ in ends]
    assert begins == [0, *(end for _, end in ends[:-1])] and ends[-1][1] >= len(wanted)
