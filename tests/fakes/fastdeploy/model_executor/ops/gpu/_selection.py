"""custom_ops/gpu_ops/sparse_indexer/indexer_topk.cuh and merge_prefill_decode_output.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdeploy import _counters
from fastdeploy._arrays import host, writable

from ._checks import check_dtypes

BLOCK_SIZE = 64
# tokens of a row that a thread block of the merge copies at a time, by head_dim
_MERGED_TOKENS = {128: 4, 192: 4, 256: 2}

_launches = 0


def radix_topk_ragged_transform(
    input: Any,
    output: Any,
    offsets: Any,
    lengths: Any,
    seq_len_decoder: Any,
    batch_id_per_token: Any,
    block_tables: Any,
    buffer: Any,
    max_block_num: int,
    top_k: int,
    q_num_heads: int,
) -> None:
    """The best columns of each row: plus `offsets[row]`, or, with tables, as physical slots.

    Ragged: row t is token t's and `lengths` counts its columns. Paged: row b belongs to batch row
    b, `seq_len_decoder` counts its columns, and what is found goes to the row's first token.
    Which of equal scores win, and the order of all, is the order in which threads come: another
    one in every launch.
    """
    global _launches
    op = "radix_topk_ragged_transform"
    _counters.launch(op)
    check_dtypes(op, "int32", output=output, offsets=offsets, lengths=lengths)
    check_dtypes(op, "float32|bfloat16", input=input)
    _launches += 1
    arrival = np.random.default_rng(_launches)
    scores = host(input)
    with writable(output) as out:
        if block_tables is None:
            length = host(lengths).reshape(-1)
            for row in range(min(len(scores), len(out))):
                found = _best(scores[row], int(length[row]), top_k, arrival)
                out[row, : len(found)] = found + int(host(offsets)[row])
            return
        tables, batch = host(block_tables), host(batch_id_per_token).reshape(-1)[: len(out)]
        length = host(seq_len_decoder).reshape(-1)
        for row in np.flatnonzero(length > 0):
            tokens = np.flatnonzero(batch == row)
            if len(tokens):
                found = _best(scores[row], int(length[row]), top_k, arrival)
                slots = tables[row, found // BLOCK_SIZE] * BLOCK_SIZE + found % BLOCK_SIZE
                out[tokens[0], : len(found)] = slots


def _best(scores: np.ndarray, length: int, top_k: int, arrival: np.random.Generator) -> np.ndarray:
    """Columns of the `top_k` best of the first `length` scores."""
    columns = arrival.permutation(length)
    if length <= top_k:
        return columns
    return columns[np.argsort(-scores[columns], kind="stable")[:top_k]]


def merge_prefill_decode_output(
    prefill_out: Any,
    decode_out: Any,
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    cu_seqlens_q: Any,
    head_num: int,
    head_dim: int,
    max_token: int,
) -> None:
    """Copy the tokens of decode rows into `prefill_out`, a few at most of each row."""
    op = "merge_prefill_decode_output"
    _counters.launch(op)
    if head_dim not in _MERGED_TOKENS:
        raise ValueError(f"{op}: head_dim is {head_dim}, allowed are 128, 192 and 256")
    unit = _MERGED_TOKENS[head_dim]
    covered = -(-max_token // unit) * unit
    encoder, decoder, now = (
        host(lengths).reshape(-1)
        for lengths in (seq_lens_encoder, seq_lens_decoder, seq_lens_this_time)
    )
    starts = host(cu_seqlens_q)
    values = host(decode_out).reshape(-1, head_num * head_dim)
    with writable(prefill_out) as out:
        rows = out.reshape(-1, head_num * head_dim)
        for row in np.flatnonzero((encoder[: len(now)] == 0) & (decoder[: len(now)] > 0)):
            first = int(starts[row])
            last = first + min(int(now[row]), covered)
            rows[first:last] = values[first:last]
