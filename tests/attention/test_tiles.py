"""Budgets that cut a step into many tiles, and tiles that span rows, change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fd_dsa.attention.step_plan as step_plan
import fd_dsa.ops.logits.host_scores as indexer_impl
import fd_dsa.ops.mla as sparse_impl
from fd_dsa.attention import CacheLayout, DSABackendConfig
from fd_dsa.attention.step_plan import StepPlan
from fd_dsa.step import StepMetadataBuilder
from tests.attention.harness import Sizes, rows_of, world_of
from tests.strategies import make_batch

# runs of prefill rows, broken by decode and idle rows; some tokens need no scores
ROWS = [
    (7, 20, 7),
    (1, 30, 1),
    (12, 0, 12),
    (0, 25, 2),
    (5, 9, 5),
    (6, 40, 6),
    (0, 0, 0),
    (3, 33, 3),
    (0, 50, 1),
    (20, 12, 20),
]
NUM_TOKENS = sum(new for _, _, new in ROWS)


def budgets(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    """Set module constants by name, wherever they stand."""
    for name, value in values.items():
        homes = [m for m in (step_plan, indexer_impl, sparse_impl) if hasattr(m, name)]
        assert homes, name
        for module in homes:
            monkeypatch.setattr(module, name, value)


BUDGETS: list[dict[str, int]] = [
    {"SCORE_TILE_VALUES": 1, "TILE_VALUES": 1},
    {"SCORE_TILE_VALUES": 3 * 27 * 4},
    {"SCORE_TILE_VALUES": 2500, "TILE_VALUES": 900},
    {"GATHER_COST": 0, "DENSE_KEYS": 0},
    {"GATHER_COST": 0, "DENSE_KEYS": 40},
    {"GATHER_COST": 0, "DENSE_KEYS": 75, "TILE_VALUES": 900},
    {"GATHER_COST": 6, "DENSE_KEYS": 0},
    {"UNIT_KEYS": 1},
    {"UNIT_KEYS": 32},
    {"TILE_BYTES": 1},
    {"TILE_BYTES": 700, "UNIT_KEYS": 1, "GATHER_COST": 0, "DENSE_KEYS": 0},
]


# bfloat16 keys are widened as they are gathered
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        *(("float32", values) for values in BUDGETS),
        *(("bfloat16", values) for values in (BUDGETS[2], *BUDGETS[-2:])),
    ],
)
def test_every_budget_gives_the_oracle(
    monkeypatch: pytest.MonkeyPatch, dtype: str, values: dict[str, int]
) -> None:
    budgets(monkeypatch, **values)
    batch = make_batch(ROWS, 16)
    world = world_of(batch, Sizes(8, 16, dtype, layers=2))
    world.check(rows_of(batch), world.run(rows_of(batch)))


def plan_of(rows: list[tuple[int, int, int]], topk: int, index_heads: int, heads: int) -> StepPlan:
    """The work lists of one step."""
    batch = make_batch(rows, 16)
    layout = CacheLayout("float32", 16, 6, 2, 4)
    sizes = len(rows), max(1, batch.num_tokens), batch.block_tables.shape[1]
    config = DSABackendConfig(heads, index_heads, topk, 1.0, layout, *sizes)
    builder = StepMetadataBuilder(*sizes, 16, device="numpy")
    slots = np.full(batch.num_tokens * topk, -1, np.int32)
    return StepPlan(builder.build(*batch.inputs()), config, slots)


def spans(tiles: Any) -> list[tuple[int, int]]:
    return [(tile.tokens.start, tile.tokens.stop) for tile in tiles]


def test_tiles_cover_what_needs_scores_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in (1, 300, 2000, 1 << 20):
        budgets(monkeypatch, SCORE_TILE_VALUES=budget)
        plan = plan_of(ROWS, 8, 3, 2)
        covered = [t for start, end in spans(plan.score_tiles) for t in range(start, end)]
        flat = [(new, cached + j) for new, cached, n in ROWS for j in range(n)]
        wanted = [t for t, (new, position) in enumerate(flat) if new and position + 1 > 8]
        assert covered == wanted
        for tile in plan.score_tiles:
            matrix = len(tile.key_slots) * 3 * (tile.tokens.stop - tile.tokens.start)
            assert matrix <= budget or tile.tokens.stop - tile.tokens.start == 1


@pytest.mark.parametrize("limit", [1, 20, 30, 45, 60, 1000])
def test_dense_tiles_keep_to_short_lists_of_keys(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    budgets(monkeypatch, DENSE_KEYS=limit, GATHER_COST=0)
    # with a selection of one key, the limit alone decides
    plan = plan_of(ROWS, 1, 3, 2)
    assert all(len(tile.key_slots) <= limit for tile in plan.dense_tiles)
    covered = [t for start, end in spans(plan.dense_tiles) for t in range(start, end)]
    flat = [(new, cached + n) for new, cached, n in ROWS for _ in range(n)]
    wanted = [t for t, (new, length) in enumerate(flat) if new and length <= limit]
    assert covered == wanted
    assert plan.gathered_tokens.tolist() == sorted(set(range(len(flat))) - set(wanted))


@pytest.mark.parametrize("joined", [1, 40, 64])
def test_short_rows_share_a_tile_up_to_a_number_of_keys(
    monkeypatch: pytest.MonkeyPatch, joined: int
) -> None:
    budgets(monkeypatch, DENSE_KEYS=1000, JOINED_KEYS=joined)
    plan = plan_of(ROWS, 1, 3, 2)
    rows_of = [np.unique(plan.batch_ids[tile.tokens]) for tile in plan.dense_tiles]
    for tile, rows in zip(plan.dense_tiles, rows_of, strict=True):
        assert len(tile.key_slots) <= joined or len(rows) == 1
    assert any(len(rows) > 1 for rows in rows_of) == (joined == 64)


def test_short_rows_need_no_scores() -> None:
    plan = plan_of([(8, 0, 8), (0, 7, 1), (3, 4, 3)], 8, 3, 2)
    assert not plan.needs_scores
    assert plan.score_tiles == ()
    assert plan.decode_rows is None


def test_budgets_as_shipped() -> None:
    """Score matrices past their budget, rows past the dense limit, gathers past one tile."""
    rows = [(600, 300, 600), (3, 850, 3), (200, 600, 200), (0, 2000, 2), (700, 0, 700)]
    batch = make_batch(rows, 64)
    world = world_of(batch, Sizes(300, 64, "bfloat16", index_heads=16))
    plan = plan_of(rows, 300, 16, 2)
    assert len(plan.score_tiles) > 3
    assert len(plan.gathered_tokens) > 0 < len(plan.dense_tiles)
    edges = {t for start, end in spans(plan.score_tiles) for t in (start, end - 1)}
    sample = sorted(edges | set(range(0, batch.num_tokens, 97)))
    world.check(rows, world.run(rows), only=sample)


def test_tiles_of_a_long_prompt_share_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets(monkeypatch, SCORE_TILE_VALUES=1)
    plan = plan_of([(20, 0, 20), (20, 50, 20)], 8, 3, 2)
    for start, length in ((0, 20), (20, 70)):
        tiles = [t for t in plan.score_tiles if start <= t.tokens.start < start + 20]
        assert len(tiles) > 2
        for tile in tiles:
            assert tile.key_slots is tiles[0].key_slots and len(tile.key_slots) == length
            assert tile.key_position is tiles[0].key_position
