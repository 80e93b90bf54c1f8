"""Exact, deterministic top-k of indexer logits, as positions or as slots of a cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import allocator_beside, as_numpy, check_array, check_values, result
from fd_dsa.ops.providers import choose, device_kind, function
from fd_dsa.tensor import Array

__all__ = ["topk_indices"]
_NAME = "topk_indices"


def topk_indices(
    logits: Array,
    lengths: Array,
    k: int,
    *,
    batch_ids: Array | None = None,
    block_tables: Array | None = None,
    block_size: int | None = None,
    num_blocks: int | None = None,
    out: Array | None = None,
) -> Any:
    """Positions of the k best columns of each row, or the cache slots that hold their keys.

    A column ranks by higher score, then by lower position; -0.0 equals +0.0 and NaN ranks below
    every number. The result is a function of the scores alone: no atomics, no order of threads.
    Entries ascend by position; -1 comes last, where a row has fewer than k columns.

    Args:
        logits: float32 [num_rows, width]; columns at or past a row's length are not looked at.
        lengths: int32 or int64 [num_rows]; valid columns of each row, 0 to width, which is
            checked on a CPU alone.
        k: entries of a row, at least 1.
        batch_ids: int32 [num_rows]; row of `block_tables`, -1 = none. With `block_tables` alone.
        block_tables: int32 [num_requests, max_blocks]; None = positions.
        block_size: tokens of a block, with `block_tables`.
        num_blocks: blocks of the cache, with `block_tables`; other entries are no blocks, and
            their keys give -1.
        out: int32 [num_rows, k], contiguous; None allocates.

    Returns:
        `out`.

    Raises:
        ShapeError, DtypeError, ValueError: an argument is not as above; before any work.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `fd_dsa.ops.providers.choose`.

    Cost on a device: three launches, one of them the selection; no wait.
    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2; order: docs/concepts/dsa.md.
    """
    check_array(_NAME, "logits", logits, (None, None), ("float32",))
    num_rows, width = logits.shape
    check_array(_NAME, "lengths", lengths, (num_rows,), ("int32", "int64"))
    numbers = {"block_size": block_size, "num_blocks": num_blocks}
    for name, value in {"batch_ids": batch_ids, **numbers}.items():
        if (value is None) != (block_tables is None):
            raise ShapeError(
                f"{_NAME}: {name} is {value} and block_tables {type(block_tables).__name__}, "
                "allowed are batch_ids, block_tables, block_size and num_blocks, or none of them"
            )
    for name, value in {"k": k, **numbers}.items():
        if value is not None and value < 1:
            raise ValueError(f"{_NAME}: {name} is {value}, allowed is at least 1")
    if block_tables is not None:
        check_array(_NAME, "batch_ids", batch_ids, (num_rows,), ("int32",))
        check_array(_NAME, "block_tables", block_tables, (None, None), ("int32",))
    out, kind = result(_NAME, out, logits, (num_rows, k), "int32"), device_kind(logits)
    if kind == "cpu":
        check_values(_NAME, "lengths", as_numpy(lengths), 0, width + 1)
        lengths = as_numpy(lengths)
    if block_tables is None:
        # one block holds every position, and slots are those
        block_size, num_blocks = 1 << max(width - 1, 1).bit_length(), 1
        batch_ids, block_tables = (
            result(_NAME, None, logits, shape, "int32", fill=0) for shape in ((num_rows,), (1, 1))
        )
    if num_rows:
        places = {"block_size": block_size, "num_blocks": num_blocks}
        positions = lengths.astype("int64") - 1
        if kind == "cpu":
            provider = choose("topk", kind).provider
        else:
            # the library's part is loaded only where there is a device
            from fd_dsa.ops.topk.custom_op import choose_topk

            assert not isinstance(logits, np.ndarray)
            provider = choose_topk(kind, allocator_beside(logits)).provider
        select = function("topk", provider)
        select(logits, positions, batch_ids, block_tables, out, **places)
    return out
