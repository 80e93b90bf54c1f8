"""The sliding window: rows that each token reads, and the row where it is kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.plan import StepRows, StepTokens

Int32Array = npt.NDArray[np.int32]


def write_window(
    cfg: V4PrepareConfig,
    rows: StepRows,
    tokens: StepTokens,
    *,
    win_idx: Int32Array,
    win_len: Int32Array,
    ext_len: Int32Array,
    swa_write: Int32Array,
) -> None:
    """Fill the window of every token, ascending and left-packed, and where the token goes.

    A token of a decode row reads all its window from the pool. A token of a prefill row reads
    what the row had before this step from there (`win_len`), and the rest, its own key included,
    from the step's keys (`ext_len`): written first, they would have overwritten the window of a
    ring. For the same reason only its last W keys are kept in a ring.
    """
    num_tokens = len(tokens.row)
    width = cfg.window_size
    position, number = tokens.position, tokens.number
    in_prefill = (rows.q > cfg.spec_tokens + 1)[tokens.row]

    oldest = np.maximum(position - (width - 1), 0)
    lengths, from_step = win_len[:num_tokens], ext_len[:num_tokens]
    np.minimum(number + 1, width, out=from_step)
    from_step *= in_prefill
    np.subtract(position + 1, oldest, out=lengths)
    lengths -= from_step
    win_len[num_tokens:] = 0
    ext_len[num_tokens:] = 0

    columns = np.arange(width, dtype=np.int32)
    window, written = win_idx[:num_tokens], swa_write[:num_tokens]
    if cfg.swa == "ring":
        first_row = (rows.slot * cfg.ring_rows)[tokens.row]
        _ring_rows(cfg, oldest, first_row, columns, window)
        np.remainder(position, cfg.ring_rows, out=written)
        written += first_row
        lost = in_prefill & (position < (rows.ctx - width)[tokens.row])
        np.copyto(written, -1, where=lost)
    else:
        _paged_rows(cfg, rows, tokens, oldest, columns, window)
        blocks = rows.block_table[tokens.row, position // cfg.block_size]
        np.multiply(blocks.astype(np.int32, copy=False), cfg.block_size, out=written)
        written += position % cfg.block_size
    np.copyto(window, -1, where=columns >= lengths[:, None])
    win_idx[num_tokens:] = -1
    swa_write[num_tokens:] = -1


def _ring_rows(
    cfg: V4PrepareConfig,
    oldest: Int32Array,
    first_row: Int32Array,
    columns: Int32Array,
    window: Int32Array,
) -> None:
    """Fill the ring rows of W positions from each token's oldest on."""
    np.add((oldest % cfg.ring_rows)[:, None], columns, out=window)
    # a window wraps at most once; read as unsigned, the smaller of x and x - R is x mod R
    unsigned = window.view(np.uint32)
    np.minimum(unsigned, unsigned - np.uint32(cfg.ring_rows), out=unsigned)
    window += first_row[:, None]


def _paged_rows(
    cfg: V4PrepareConfig,
    rows: StepRows,
    tokens: StepTokens,
    oldest: Int32Array,
    columns: Int32Array,
    window: Int32Array,
) -> None:
    """Fill the rows, in the blocks, of W positions from each token's oldest on."""
    positions = oldest[:, None] + columns
    # past the token itself the table may have no cell; those columns become -1 later
    np.minimum(positions, tokens.position[:, None], out=positions)
    blocks = rows.block_table[tokens.row[:, None], positions // cfg.block_size]
    np.multiply(blocks.astype(np.int32, copy=False), cfg.block_size, out=window)
    positions %= cfg.block_size
    window += positions
