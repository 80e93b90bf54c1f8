"""Steps of the warm-up: they reach the limits of an engine, and stay within them."""

from __future__ import annotations

import pytest

from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.startup.trial_steps import dense_steps

MAX_TOKENS, MAX_ROW_LEN = 64, 96


@pytest.mark.parametrize("max_drafts", [0, 1, 3])
@pytest.mark.parametrize(("max_rows", "max_dense_keys"), [(1, 2048), (3, 2048), (3, 40), (40, 40)])
def test_decode_steps_reach_all_rows_with_all_their_drafts(
    max_rows: int, max_dense_keys: int, max_drafts: int
) -> None:
    batch = InputBatch(max_rows, MAX_TOKENS, MAX_ROW_LEN // 16, 16)
    alone, beside, lengths = set(), set(), set()
    for rows in dense_steps(batch, max_dense_keys, max_drafts):
        decode = [row for row in rows if not row.is_prompt]
        num_tokens = sum(row.num_tokens for row in decode)
        assert len(rows) <= max_rows and sum(row.num_tokens for row in rows) <= MAX_TOKENS
        assert all(row.num_tokens <= 1 + max_drafts for row in decode)
        lengths |= {row.num_tokens + row.num_cached for row in decode}
        (alone if decode == rows else beside).add(num_tokens)
    longest = min(max_dense_keys + 1, MAX_ROW_LEN)
    assert max(lengths) == longest and longest - 1 in lengths
    assert max(alone) == min(max_rows * (1 + max_drafts), MAX_TOKENS)
    # these are only near their limit
    assert 2 * max(beside) >= min((max_rows - 1) * (1 + max_drafts), MAX_TOKENS - 1)
    # a row alone may have any number of drafts
    assert set(range(1, 2 + max_drafts)) <= alone
