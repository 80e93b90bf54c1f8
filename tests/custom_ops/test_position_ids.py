"""FastDeploy's operator for positions, in the form of #7367."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.custom_ops.position_rows import MANY, Rows, expected, lengths_of

paddle = pytest.importorskip("paddle")

EXAMPLES = settings(
    max_examples=min(60, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# idle, first chunk, later chunk (both lengths above 0), decode, drafts
KINDS = st.sampled_from([(0, 0), (1, 0), (1, 1), (0, 1)])
ROWS = st.lists(st.tuples(KINDS, st.integers(0, 70), st.integers(0, 9)), min_size=1, max_size=60)


def rows_from(drawn: list[tuple[tuple[int, int], int, int]]) -> Rows:
    """Rows of a legal step."""
    return [
        (new if prefill else 0, cached if has_cache else 0, new)
        for (prefill, has_cache), cached, new in drawn
    ]


@EXAMPLES
@given(drawn=ROWS, extra=st.integers(0, 300))
def test_any_step_equals_the_oracle(ops: Any, drawn: Any, extra: int) -> None:
    rows = rows_from(drawn)
    total = sum(new for _, _, new in rows)
    positions = paddle.full([total + extra], -91, dtype="int32")
    tensors = [paddle.to_tensor(lengths) for lengths in lengths_of(rows)]
    found = ops.get_position_ids_and_mask_encoder_batch(*tensors, positions)
    np.testing.assert_array_equal(positions.numpy(), expected(rows, total + extra))
    assert found.data_ptr() == positions.data_ptr()


@pytest.mark.parametrize("name", MANY)
def test_many_rows_and_tokens(ops: Any, name: str) -> None:
    total = sum(new for _, _, new in MANY[name])
    positions = paddle.full([total + 5], -91, dtype="int32")
    tensors = [paddle.to_tensor(lengths) for lengths in lengths_of(MANY[name])]
    ops.get_position_ids_and_mask_encoder_batch(*tensors, positions)
    np.testing.assert_array_equal(positions.numpy(), expected(MANY[name], total + 5))


def test_what_is_refused_is_named(ops: Any) -> None:
    tensors = [paddle.to_tensor(lengths) for lengths in lengths_of([(0, 3, 1), (2, 1, 2)])]
    positions = paddle.full([3], -91, dtype="int32")
    op = ops.get_position_ids_and_mask_encoder_batch
    with pytest.raises(OSError, match=r"seq_lens_decoder: got shape \[1\], .*shape \[2\]"):
        op(tensors[0], tensors[1][:1], tensors[2], positions)
    with pytest.raises(OSError, match="position_ids: got dtype int64, allowed is int32"):
        op(*tensors, positions.astype("int64"))
    with pytest.raises(OSError, match="seq_lens_this_time: got dtype float32"):
        op(*tensors[:2], tensors[2].astype("float32"), positions)
    with pytest.raises(TypeError, match="takes 4 positional arguments but 5 were given"):
        op(*tensors, positions, positions)
    assert (positions == -91).all()
