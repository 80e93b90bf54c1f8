"""Index arrays of a device's step against those of `v4_prepare`, with padding of all sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.models.registry import config_from_dict
from fd_dsa.runner import InputBatch
from fd_dsa.v4_attention.device_pools import DeviceLayout
from fd_dsa.v4_attention.device_step import DeviceStep, StepPlaces
from fd_dsa.v4_attention.pools import prepare_sizes
from fd_dsa.v4_prepare import v4_prepare_np
from tests.kernel_memory import KernelMemory
from tests.strategies import examples
from tests.v4_model.cases import CASES, CSA, HCA

pytestmark = pytest.mark.triton

ROWS, TOKENS, COLUMNS, BLOCK = 4, 200, 12, 16
CONFIG = config_from_dict(CASES["mixed"].config)
BATCH = InputBatch(ROWS, TOKENS, COLUMNS, BLOCK)
# tokens before a step and in it: decoding rows, idle ones, chunks across tiles and windows
ROW = st.tuples(st.integers(0, 40), st.sampled_from([0, 1, 1, 1, 2, 7, 9, 31, 140]))
# around the ends of entries, windows and blocks
EDGES = [(before, 1) for before in (3, 4, 7, 8, 14, 15, 16, 31)]


def check_snapshots(
    m: KernelMemory, step: DeviceStep, total: int, rows: tuple[np.ndarray, ...], ring: int
) -> None:
    """Compare the keys and CSA sources of snapshots with a loop over tokens."""
    plan, token, places, num_rows = step.plans[CSA], 0, np.full(total, -1), len(rows[0])
    kept: list[list[tuple[int, ...]]] = [[] for _ in range(num_rows)]
    for row, (before, new, slot, end) in enumerate(zip(*rows, strict=True)):
        for position in range(before, before + new):
            if slot >= 0 and end - CONFIG.sliding_window <= position < end:
                places[token] = slot * ring + position % ring
            if slot >= 0 and end - plan.pool <= position < end:
                kept[row].append((token, slot, position))
            token += 1
    assert step.snapshot_rows is not None
    np.testing.assert_array_equal(m.get(step.snapshot_rows)[:total], places)
    cells = m.get(plan.kept)[plan.num_kept - num_rows * plan.pool : plan.num_kept]
    for row, found in enumerate(cells.reshape(num_rows, plan.pool, 4).tolist()):
        assert [tuple(cell[:3]) for cell in found if cell[0] >= 0] == kept[row]


def check(
    m: KernelMemory, rows: list[tuple[int, int]], padding: int, idle_rows: int, drafts: int = 0
) -> None:
    """Compare the arrays of a step with padding after its tokens and after its rows."""
    places = StepPlaces(DeviceLayout(CONFIG, "float32", BLOCK, drafts), BATCH, m.poisoned)
    before, new = np.array(rows + [(0, 0)] * idle_rows, np.int32).T.copy()
    table = np.random.default_rng(1).permutation(ROWS * COLUMNS)[: len(new) * COLUMNS]
    table = table.reshape(-1, COLUMNS).astype(np.int32)
    count = int(new.sum())
    total = max(min(count + padding, TOKENS), 1)
    # rows with a block that ends in the step, but not every one of them
    ends = (before + new - 1) // BLOCK * BLOCK
    slots = np.where((ends > before) & (before % 3 > 0), ROWS + np.arange(len(new)), -1)
    slots = slots.astype(np.int32)
    given = m.put(before), m.put(new), m.put(table), total, COLUMNS * BLOCK, m.put(slots)
    step = places.fill(*given, has_prompts=True)
    check_snapshots(m, step, total, (before, new, slots, ends), CONFIG.sliding_window + drafts)
    pool = step.plans[CSA].pool
    of_csa = step.plans[CSA]._replace(num_kept=step.plans[CSA].num_kept - len(new) * pool)
    sizes = prepare_sizes(CONFIG, BATCH, ROWS * COLUMNS, drafts)
    sizes = replace(sizes, swa="ring", comp_base=0)
    wanted = v4_prepare_np(sizes, before + new, new, np.arange(len(new)), table)
    view = step.index_view
    assert view is not None and view.max_seqlen_k == COLUMNS * BLOCK // 4
    for found, name in (
        (step.places.positions, "positions"),
        (step.places.rows, "req_of_token"),
        (step.ring_rows, "swa_write"),
    ):
        np.testing.assert_array_equal(m.get(found)[:total], getattr(wanted, name)[:total], name)
    newest = wanted.csa_visible.astype(np.int64)[:total] - 1
    np.testing.assert_array_equal(m.get(view.position_ids)[:total], newest)
    starts = wanted.cu_q[: len(new) + 1]
    np.testing.assert_array_equal(m.get(step.places.starts)[: len(starts)], starts)
    for kind, ratio in ((CSA, "r1"), (HCA, "r2")):
        plan = of_csa if kind == CSA else step.plans[kind]
        # no work of the step is past the bound, and the rest up to it is none
        assert (getattr(wanted, f"plan_{ratio}")[plan.num_entries :, 0] < 0).all()
        assert (getattr(wanted, f"wplan_{ratio}")[plan.num_kept :, 0] < 0).all()
        for found, name, size in (
            (plan.entries, "plan", plan.num_entries),
            (plan.rows, "plan_dst", plan.num_entries),
            (plan.kept, "wplan", plan.num_kept),
        ):
            reference = getattr(wanted, f"{name}_{ratio}")[:size]
            np.testing.assert_array_equal(m.get(found)[:size], reference, f"{name}_{ratio}")


@examples(6, in_soak=60)
@given(
    rows=st.lists(ROW, min_size=1, max_size=ROWS),
    padding=st.integers(0, 150),
    drafts=st.sampled_from([0, 3, 9]),
)
def test_any_step_has_the_arrays_of_the_oracle(
    paddle_memory: KernelMemory, rows: list[tuple[int, int]], padding: int, drafts: int
) -> None:
    rows = rows if sum(new for _, new in rows) <= TOKENS else rows[:1]
    check(paddle_memory, rows, padding, 0, drafts)


@pytest.mark.parametrize("first", [0, 4])
def test_decoding_rows_at_the_ends_of_entries(paddle_memory: KernelMemory, first: int) -> None:
    check(paddle_memory, EDGES[first : first + 3], 5, 1)


def test_snapshots_with_tokens_of_earlier_steps(paddle_memory: KernelMemory) -> None:
    """A block ends soon after the step begins, and other rows have tokens before it."""
    check(paddle_memory, [(5, 9), (13, 7), (28, 9)], 5, 1)


def test_tokens_past_the_longest_row(paddle_memory: KernelMemory) -> None:
    """Further drafts of a row without room take its last place, so that nothing is out of reach."""
    m, longest = paddle_memory, COLUMNS * BLOCK
    places = StepPlaces(DeviceLayout(CONFIG, "float32", BLOCK, 3), BATCH, m.poisoned)
    before = np.array([longest - 1, longest, longest + 1], np.int32)
    table = np.zeros((3, COLUMNS), np.int32)
    new = np.ones(3, np.int32)
    given = m.put(before), m.put(new), m.put(table), 3, longest
    step = places.fill(*given, has_prompts=False)
    assert step.snapshot_rows is None
    assert (m.get(step.places.positions)[:3] == longest - 1).all()
    assert m.get(step.places.rows)[:3].tolist() == [0, 1, 2]
