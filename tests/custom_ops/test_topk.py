"""The Paddle operators fd_dsa_topk and fd_dsa_topk_slots against a sort, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.custom_ops.topk_rows import KINDS, SPECIAL, best, scores_of
from tests.ops.paged_rows import SMALL_ROWS, PagedRows, paged_rows
from tests.reference.topk import ref_slot, ref_topk

paddle = pytest.importorskip("paddle")

EXAMPLES = settings(
    max_examples=min(150, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def positions_of(ops: Any, scores: np.ndarray, lengths: Any, k: int) -> np.ndarray:
    """What fd_dsa_topk writes over poison."""
    out = paddle.full([len(scores), k], -91, dtype="int32")
    counts = paddle.to_tensor(np.array(lengths, np.int32))
    found = ops.fd_dsa_topk(paddle.to_tensor(scores), counts, out)
    assert found.data_ptr() == out.data_ptr()
    return out.numpy()


@st.composite
def score_rows(draw: st.DrawFn) -> tuple[np.ndarray, list[int], int]:
    """Scores full of ties and special values, any lengths, any k."""
    width = draw(st.integers(1, 20))
    value = st.one_of(st.sampled_from([*map(float, SPECIAL)]), st.floats(width=32))
    rows = draw(st.lists(st.lists(value, min_size=width, max_size=width), min_size=1, max_size=4))
    length = st.integers(-2, width + 3)
    lengths = draw(st.lists(length, min_size=len(rows), max_size=len(rows)))
    return np.array(rows, np.float32), lengths, draw(st.integers(1, 24))


@EXAMPLES
@given(case=score_rows())
def test_any_row_equals_a_sort(ops: Any, case: tuple[np.ndarray, list[int], int]) -> None:
    scores, lengths, k = case
    wanted = [ref_topk(row, max(n, 0), k) for row, n in zip(scores, lengths, strict=True)]
    np.testing.assert_array_equal(positions_of(ops, scores, lengths, k), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_rows(ops: Any, kind: str) -> None:
    scores, lengths = scores_of(kind, 5, 3000, seed=1), [3000, 2999, 2049, 2048, 0]
    np.testing.assert_array_equal(
        positions_of(ops, scores, lengths, 2048), best(scores, lengths, 2048)
    )


def test_no_rows_and_nothing_wanted(ops: Any) -> None:
    assert positions_of(ops, np.zeros((0, 4), np.float32), [], 3).shape == (0, 3)
    assert positions_of(ops, np.zeros((2, 0), np.float32), [0, 0], 3).tolist() == [[-1] * 3] * 2
    assert positions_of(ops, np.zeros((2, 4), np.float32), [4, 4], 0).shape == (2, 0)


def slot_arguments(step: PagedRows, scores: np.ndarray, k: int) -> dict[str, Any]:
    """Arguments of fd_dsa_topk_slots for all tokens of a step."""
    put = paddle.to_tensor
    return {
        "logits": put(scores),
        "position_ids": put(step.position_ids),
        "batch_id_per_token": put(step.batch_ids),
        "block_tables": put(step.block_tables),
        "slots": paddle.full([step.num_tokens, k], -91, dtype="int32"),
        "block_size": step.block_size,
        "num_blocks": step.num_blocks,
        "first_token": 0,
        "num_rows": -1,
    }


def slots_of(step: PagedRows, scores: np.ndarray, k: int) -> np.ndarray:
    """The oracle's slots of all tokens."""
    rows = [
        [ref_slot(p, step.block_tables[b], step.block_size) for p in ref_topk(line, n, k)]
        for line, n, b in zip(scores, step.window, step.batch_ids, strict=True)
    ]
    return np.array(rows, np.int32)


@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_slots_of_a_step(ops: Any, block_size: int) -> None:
    step = paged_rows(SMALL_ROWS, block_size)
    scores = scores_of("few values", step.num_tokens, 70, seed=block_size)
    arguments = slot_arguments(step, scores, 9)
    ops.fd_dsa_topk_slots(**arguments)
    np.testing.assert_array_equal(arguments["slots"].numpy(), slots_of(step, scores, 9))


def test_a_chunk(ops: Any) -> None:
    step = paged_rows(SMALL_ROWS, 16)
    scores = scores_of("normal", step.num_tokens, 70, seed=0)
    arguments = slot_arguments(step, scores[6:9], 4) | {"first_token": 6}
    ops.fd_dsa_topk_slots(**arguments)
    found = arguments["slots"].numpy()
    np.testing.assert_array_equal(found[6:9], slots_of(step, scores, 4)[6:9])
    assert (found[:6] == -91).all() and (found[9:] == -91).all()


def test_short_windows_need_no_scores(ops: Any) -> None:
    step = paged_rows(SMALL_ROWS, 16)
    arguments = slot_arguments(step, np.zeros((1, 1), np.float32), 70)
    arguments["num_rows"] = step.num_tokens
    ops.fd_dsa_topk_slots(**arguments)
    anything = np.zeros((step.num_tokens, 70), np.float32)
    np.testing.assert_array_equal(arguments["slots"].numpy(), slots_of(step, anything, 70))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logits": paddle.zeros([3, 4], "float64")}, "logits: got dtype float64"),
        ({"logits": paddle.zeros([12])}, r"logits: got shape \[12\]"),
        ({"slots": paddle.zeros([3, 2], "int64")}, "slots: got dtype int64"),
        ({"position_ids": paddle.zeros([3], "int32")}, "position_ids: got dtype int32"),
        ({"position_ids": paddle.zeros([2], "int64")}, r"position_ids: got shape \[2\]"),
        ({"batch_id_per_token": paddle.zeros([4], "int32")}, r"batch_id_per_token: got shape"),
        ({"block_tables": paddle.zeros([4], "int32")}, r"block_tables: got shape \[4\]"),
        ({"block_size": 0}, "block_size: got 0, allowed are 1"),
        ({"num_blocks": -1}, "num_blocks: got -1"),
        ({"num_rows": 4}, r"num_rows \(-1 = those of logits\): got 4"),
        ({"first_token": 1}, r"first_token: got 1, allowed are 0\.\.0"),
    ],
)
def test_refusals_say_what_is_wrong(ops: Any, changes: dict[str, Any], said: str) -> None:
    step = paged_rows(((0, 3),), 4, num_padded=0)
    arguments = slot_arguments(step, np.zeros((3, 4), np.float32), 2) | changes
    with pytest.raises(Exception, match=f"fd_dsa_topk_slots: {said}"):
        ops.fd_dsa_topk_slots(**arguments)


def test_refusals_of_the_positions(ops: Any) -> None:
    scores, counts = paddle.zeros([3, 4]), paddle.zeros([3], "int32")
    with pytest.raises(Exception, match=r"fd_dsa_topk: lengths: got shape \[2\]"):
        ops.fd_dsa_topk(scores, paddle.zeros([2], "int32"), paddle.zeros([3, 2], "int32"))
    with pytest.raises(Exception, match=r"positions: got shape \[2, 2\], allowed is \[3, k\]"):
        ops.fd_dsa_topk(scores, counts, paddle.zeros([2, 2], "int32"))
