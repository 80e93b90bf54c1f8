"""What every provider of `select_slots` takes."""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops._host import check_array, check_tokens

_NAME = "select_slots"


def check_logits(logits: Any) -> int:
    """Check the scores of a call; returns the distance between their rows.

    Raises:
        ShapeError, DtypeError: see `triton_kernel.select_slots`.
    """
    check_array(_NAME, "logits", logits, (None, None), ("float32",))
    row_stride, column_stride = logits.stride()
    if column_stride != 1 and logits.shape[1] > 1:
        raise ShapeError(
            f"{_NAME}: logits has strides {[row_stride, column_stride]}, the last must be 1"
        )
    return row_stride


def check_selection(
    position_ids: Any, batch_id_per_token: Any, block_tables: Any, slots: Any
) -> None:
    """Check the other tensors of a call.

    Raises:
        ShapeError, DtypeError: see `triton_kernel.select_slots`.
    """
    check_array(_NAME, "slots", slots, (None, None), ("int32",))
    check_tokens(_NAME, slots.shape[0], position_ids, batch_id_per_token, block_tables)
