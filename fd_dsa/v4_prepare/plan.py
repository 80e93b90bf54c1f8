"""The tokens of a step, and what its compressors pool and keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fd_dsa.v4_prepare.checks import StepInputs
from fd_dsa.v4_prepare.compressed import entry_rows
from fd_dsa.v4_prepare.config import V4PrepareConfig

Int32Array = npt.NDArray[np.int32]


class StepRows(NamedTuple):
    """The rows of a step: int32 [B] four times and the block table as it was given."""

    ctx: Int32Array
    q: Int32Array
    start: Int32Array
    slot: Int32Array
    block_table: npt.NDArray[Any]


class StepTokens(NamedTuple):
    """The tokens of a step, int32 [T]: row, position, number inside the row's step."""

    row: Int32Array
    position: Int32Array
    number: Int32Array


def step_rows(inputs: StepInputs) -> StepRows:
    """Lengths and slots of checked inputs as int32."""
    # the slot of an idle row may be any number; it is never used
    ctx, q, slot = (array.astype(np.int32, copy=False) for array in inputs[:3])
    return StepRows(ctx, q, ctx - q, slot, inputs.block_table)


def step_tokens(rows: StepRows, num_tokens: int) -> StepTokens:
    """Row, position and number of every token, rows in order."""
    row = np.arange(len(rows.q), dtype=np.int32).repeat(rows.q)
    first = np.cumsum(rows.q, dtype=np.int32) - rows.q
    number = np.arange(num_tokens, dtype=np.int32) - first[row]
    return StepTokens(row, rows.start[row] + number, number)


def write_layout(
    rows: StepRows,
    tokens: StepTokens,
    *,
    positions: Int32Array,
    req_of_token: Int32Array,
    cu_q: Int32Array,
    ctx: Int32Array,
) -> None:
    """Fill positions (pad 0), req_of_token (-1), cu_q (T repeated) and ctx (0)."""
    num_rows, num_tokens = len(rows.q), len(tokens.row)
    positions[:num_tokens] = tokens.position
    positions[num_tokens:] = 0
    req_of_token[:num_tokens] = tokens.row
    req_of_token[num_tokens:] = -1
    cu_q[0] = 0
    np.cumsum(rows.q, out=cu_q[1 : num_rows + 1])
    cu_q[num_rows + 1 :] = num_tokens
    ctx[:num_rows] = rows.ctx
    ctx[num_rows:] = 0


def write_plans(
    cfg: V4PrepareConfig,
    rows: StepRows,
    tokens: StepTokens,
    ratio: int,
    *,
    plan: Int32Array,
    plan_dst: Int32Array,
    wplan: Int32Array,
) -> tuple[int, int]:
    """Fill the plans of one ratio; the numbers of their rows.

    A plan row is (token, request, position, sources that come from the state ring). `plan` has
    one for each entry that the step finishes, `plan_dst` where that entry goes, `wplan` one for
    each token that is among the last K(r) of its request and so goes into the state ring. All are
    in token order, -1 behind the last row.
    """
    finished = ((tokens.position + 1) % ratio == 0).nonzero()[0]
    num_finished = len(finished)
    _write_work(tokens, finished, cfg.pool(ratio), plan)
    entries = tokens.position[finished] // ratio
    plan_dst[:num_finished] = entry_rows(
        cfg, rows.block_table, tokens.row[finished], entries, ratio
    )
    plan_dst[num_finished:] = -1
    kept = (tokens.position >= (rows.ctx - cfg.pool(ratio))[tokens.row]).nonzero()[0]
    _write_work(tokens, kept, cfg.pool(ratio), wplan)
    return num_finished, len(kept)


def _write_work(
    tokens: StepTokens, chosen: npt.NDArray[np.intp], pool: int, work: Int32Array
) -> None:
    """Fill plan rows for some of the tokens, -1 behind them."""
    count = len(chosen)
    work[:count, 0] = chosen
    work[:count, 1] = tokens.row[chosen]
    work[:count, 2] = tokens.position[chosen]
    # the step's own tokens up to this one are read from the step, the rest from the ring
    np.subtract(pool - 1, tokens.number[chosen], out=work[:count, 3])
    np.maximum(work[:count, 3], 0, out=work[:count, 3])
    work[count:] = -1
