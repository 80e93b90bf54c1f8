"""Chunks of tokens that DeepGEMM scores: sizes that are compiled, within memory, none left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the chunks lie beside kernels")

from fd_dsa.attention.device_logits import chunk_bounds, padded_rows, rows_within

COMPILED = {32, 64, 128, 256, 512, *range(1024, 200_000, 1024)}
sizes = st.integers(1, 20_000)


@given(sizes)
def test_rows_are_a_compiled_number(rows: int) -> None:
    more, fewer = padded_rows(rows), rows_within(rows)
    assert {more, fewer} <= COMPILED
    assert more >= rows and (fewer <= rows or fewer == 32)
    assert not any(rows <= size < more for size in COMPILED)
    assert not any(fewer < size <= rows for size in COMPILED)


@given(most=sizes, tokens=st.integers(0, 20_000), chunk=st.integers(1, 10_000))
def test_chunks_hold_every_token_within_the_buffers(most: int, tokens: int, chunk: int) -> None:
    tokens, rows = min(tokens, most), rows_within(chunk)
    bounds = chunk_bounds(tokens, rows)
    assert [t for first, n, _ in bounds for t in range(first, first + n)] == list(range(tokens))
    assert all(padded <= rows and padded in COMPILED for _, _, padded in bounds)
    # buffers are as long as the padded number of the most tokens
    assert all(first + padded <= padded_rows(most) for first, _, padded in bounds)
    assert len(bounds) <= -(-most // rows)
