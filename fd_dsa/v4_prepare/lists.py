"""Lists derived from the outputs of a step: chosen CSA rows, and one list a token for all keys."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import DtypeError, ShapeError, V4PrepareError
from fd_dsa.v4_prepare.config import INT32_MAX
from fd_dsa.v4_prepare.host import V4Arrays

Int32Array = npt.NDArray[np.int32]


def csa_translate(out: V4Arrays, block_table: Any, local_topk: Any) -> Int32Array:
    """Rows of the CSA entries that the indexer chose, token after token as `csa_indptr` says.

    row = comp_base + block_table[b, e // n] * n + e % n, n = block_size // csa_ratio

    Runs once for each layer that chooses, not for each layer that reads (vLLM #57434, #57659).

    Args:
        out: outputs of the step.
        block_table: [B, columns], the step's block table.
        local_topk: [T or more, index_topk] integers; entry numbers of each token, of which the
            first min(csa_visible, index_topk) are read.

    Returns:
        int32 [counts[3]]; -1 where a number is no entry that its token sees.

    Raises:
        ShapeError, DtypeError: `local_topk` or `block_table` has another shape, or no integers.
    """
    cfg = out.config
    num_rows, num_tokens = int(out.counts[0]), int(out.counts[1])
    table, chosen = np.asarray(block_table), np.asarray(local_topk)
    for name, array in (("block_table", table), ("local_topk", chosen)):
        if array.size and array.dtype.kind not in "iu":
            raise DtypeError(f"{name}: got {array.dtype}, must be an integer dtype; convert it")
    if chosen.ndim != 2 or len(chosen) < num_tokens or chosen.shape[1] != cfg.index_topk:
        raise ShapeError(
            f"local_topk: got {chosen.shape}, must be [{num_tokens} or more, {cfg.index_topk}]; "
            "pass one row of index_topk entry numbers for each token of the step"
        )
    if num_rows and (table.ndim != 2 or len(table) < num_rows):
        raise ShapeError(
            f"block_table: got {table.shape}, must be [{num_rows} or more, columns]; pass the "
            "table of the step"
        )
    visible = out.csa_visible[:num_tokens, None]
    kept = np.arange(cfg.index_topk) < visible
    entry = chosen[:num_tokens][kept]
    token = np.repeat(np.arange(num_tokens), np.diff(out.csa_indptr[: num_tokens + 1]))
    seen = (entry >= 0) & (entry < out.csa_visible[token])
    rows = np.full(len(entry), -1, np.int32)
    if seen.any():
        per_block = cfg.block_size // cfg.csa_ratio
        entry = entry[seen]
        block = table[out.req_of_token[token[seen]], entry // per_block].astype(np.int32)
        rows[seen] = cfg.comp_base + block * per_block + entry % per_block
    return rows


def fused_list(
    out: V4Arrays, kind: Literal["swa", "csa", "hca"], csa_rows: Any = None
) -> tuple[Int32Array, Int32Array]:
    """Offsets and rows of one list a token: its compressed rows first, its window rows last.

    Args:
        out: outputs of the step.
        kind: "swa" = window only, "csa" or "hca" = with the entries of that kind.
        csa_rows: what `csa_translate` returned, for kind "csa"; None = -1 in their places.

    Returns:
        indptr int32 [Tcap + 1], the last one repeated, and rows int32 [indptr[T]].

    Raises:
        ValueError: an unknown kind, "hca" in table mode, or rows given for another kind.
        ShapeError: `csa_rows` has another length than the step's CSA lists.
        V4PrepareError: E_INDPTR, the lists together exceed int32.

    Source: the order is that of ROCm/ATOM #1343.
    """
    offsets, entries = _compressed_part(out, kind, csa_rows)
    counts = np.diff(offsets)
    total = len(entries) + int(out.win_len.sum(dtype=np.int64))
    if total > INT32_MAX:
        raise V4PrepareError(
            "E_INDPTR", -1, f"a fused list of {total} rows > {INT32_MAX}, its offsets are int32"
        )
    indptr = np.zeros(len(out.win_len) + 1, np.int32)
    np.cumsum(counts + out.win_len, out=indptr[1:])
    rows = np.empty(total, np.int32)
    is_window = np.ones(total, np.bool_)
    at = np.arange(len(entries)) + np.repeat(indptr[:-1] - offsets[:-1], counts)
    rows[at] = entries
    is_window[at] = False
    # left-packed windows in token order fill the places that are left
    rows[is_window] = out.win_idx[np.arange(out.win_idx.shape[1]) < out.win_len[:, None]]
    return indptr, rows


def _compressed_part(out: V4Arrays, kind: str, csa_rows: Any) -> tuple[Int32Array, Int32Array]:
    """Offsets and rows of the compressed entries in the lists of one kind."""
    if csa_rows is not None and kind != "csa":
        raise ValueError(f"csa_rows: got rows for kind {kind!r}, only 'csa' has them; pass None")
    if kind == "swa":
        return np.zeros_like(out.csa_indptr), np.empty(0, np.int32)
    if kind == "csa":
        num_csa = int(out.counts[3])
        rows = np.full(num_csa, -1, np.int32) if csa_rows is None else np.asarray(csa_rows)
        if rows.shape != (num_csa,):
            raise ShapeError(
                f"csa_rows: got {rows.shape}, must be ({num_csa},); pass what csa_translate "
                "returned for this step"
            )
        return out.csa_indptr, rows
    if kind != "hca":
        raise ValueError(f"kind: got {kind!r}, allowed are 'swa', 'csa', 'hca'")
    if out.hca_idx is None:
        raise ValueError(
            "kind: got 'hca', but there is no list of HCA rows in table mode; construct the "
            "configuration with hca_mode='list', or read the rows from the block table"
        )
    return out.hca_indptr, out.hca_idx[: int(out.counts[2])]
