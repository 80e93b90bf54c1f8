"""Verification of drafts, and correction of the next step, which is enqueued before it.

A draft is accepted if it equals the token sampled in its place and all drafts before it are
accepted. The host plans the next step as if all drafts were accepted. The kernels here correct
lengths and positions by the number of accepted drafts.
"""

from __future__ import annotations

from fd_dsa.ops.sampling import token_buffer
from fd_dsa.ops.sampling.scan_kernels import FLAGS, PENALIZED, RECORD
from fd_dsa.ops.step_kernel import step_kernel

import triton.language as tl  # isort: skip

_REJECTED = tl.constexpr(token_buffer.REJECTED)


@step_kernel()
def verify_kernel(
    tokens_ptr,
    ids_ptr,
    sampled_ptr,
    batch_rows_ptr,
    positions_ptr,
    logits_indptr_ptr,
    cached_ptr,
    lengths_ptr,
    next_ptr,
    newest_ptr,
    records_ptr,
    outputs_ptr,
    STRIDE: tl.constexpr,
    MAX_DRAFTS: tl.constexpr,
    VOCAB: tl.constexpr,
):
    """Mark the samples of request `program 0` after its first rejected draft.

    The request has the rows from `logits_indptr[program 0]` on: its own, then one for each draft.

    `next` describes the next draft by four rows of STRIDE values: the flat token before it, the
    batch row (-1 = no request), the position of the draft, and the number of tokens in the cache.
    `newest` gets the last accepted token. `outputs` counts all accepted tokens of batch rows with
    penalties.
    """
    program = tl.program_id(0)
    first = tl.load(logits_indptr_ptr + program)
    last, batch_row, position, cached = first * 0, first * 0 - 1, first * 0, first * 0
    # the first row of all requests is followed by the number of rows, then by -1
    count = tl.load(logits_indptr_ptr + program + 1) - first - 1
    if count >= 0:
        accepted = first * 0
        for place in range(MAX_DRAFTS):
            # the load stays within the rows of the request
            row = first + tl.minimum(place, count)
            token = tl.load(tokens_ptr + row)
            draft = tl.load(ids_ptr + tl.load(sampled_ptr + row) + tl.where(place < count, 1, 0))
            is_accepted = (accepted == place) & (place < count) & (token >= 0) & (token == draft)
            accepted += is_accepted.to(tl.int32)
            if (place < count) & (accepted <= place):
                tl.store(tokens_ptr + row + 1, _REJECTED)
        last = tl.load(sampled_ptr + first + accepted)
        batch_row = tl.load(batch_rows_ptr + first)
        position = tl.load(positions_ptr + first + accepted) + 1
        cached = (
            tl.load(cached_ptr + batch_row) + tl.load(lengths_ptr + batch_row) - (count - accepted)
        )
        tl.store(newest_ptr + program, tl.load(tokens_ptr + first + accepted))
        if (tl.load(records_ptr + batch_row.to(tl.int64) * RECORD + FLAGS) & PENALIZED) != 0:
            for place in range(MAX_DRAFTS + 1):
                token = tl.load(tokens_ptr + first + tl.minimum(place, accepted))
                cell = outputs_ptr + batch_row.to(tl.int64) * VOCAB + token
                tl.atomic_add(cell, 1, mask=(place <= accepted) & (token >= 0))
    tl.store(next_ptr + program, last)
    tl.store(next_ptr + STRIDE + program, batch_row)
    tl.store(next_ptr + 2 * STRIDE + program, position)
    tl.store(next_ptr + 3 * STRIDE + program, cached)


FOLLOW_BLOCK = 256


@step_kernel()
def follow_kernel(
    ids_ptr,
    tokens_ptr,
    known_ptr,
    num_ids,
    cached_ptr,
    pending_source_ptr,
    batch_rows_ptr,
    positions_ptr,
    num_rows,
    num_samples,
    BLOCK: tl.constexpr,
):
    """Resolve the pending tokens of a step. Program p handles ids [p * BLOCK, (p + 1) * BLOCK).

    A value of -1 - i, made by `InputBatch.staged_ids`, becomes token i of the token buffer. Program
    0 also corrects all rows: row i continues request `pending_source[i]` of the step before, if
    any, which has `known` tokens in the cache. The host has planned with the maximum, so the
    positions of the batch row's samples become smaller by the difference.
    """
    program, lane = tl.program_id(0), tl.arange(0, BLOCK)
    place = program * BLOCK + lane
    token = tl.load(ids_ptr + place, mask=place < num_ids, other=0)
    sampled = tl.load(tokens_ptr + (-1 - token), mask=token < 0, other=0)
    tl.store(ids_ptr + place, sampled.to(tl.int32), mask=token < 0)
    if program == 0:
        for start in range(0, num_samples, BLOCK):
            row = start + lane
            batch_row = tl.load(batch_rows_ptr + row, mask=row < num_samples, other=-1)
            position = tl.load(positions_ptr + row, mask=batch_row >= 0, other=0)
            source = tl.load(pending_source_ptr + batch_row, mask=batch_row >= 0, other=-1)
            planned = tl.load(cached_ptr + batch_row, mask=source >= 0, other=0)
            known = tl.load(known_ptr + source, mask=source >= 0, other=0)
            tl.store(positions_ptr + row, position - (planned - known), mask=batch_row >= 0)
        # the loop above must have read all lengths before the next one writes them
        tl.debug_barrier()
        for start in range(0, num_rows, BLOCK):
            row = start + lane
            source = tl.load(pending_source_ptr + row, mask=row < num_rows, other=-1)
            known = tl.load(known_ptr + source, mask=source >= 0, other=0)
            tl.store(cached_ptr + row, known, mask=source >= 0)


@step_kernel()
def extend_kernel(
    next_ptr,
    cached_ptr,
    lengths_ptr,
    num_requests,
    num_rows,
    depth,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set the lengths of the step of a further draft, which has one token of each request.

    `next` is the result of `verify_kernel`. Its batch rows ascend, and its positions become
    those of the new drafts. Lengths are indexed by batch row. `depth` drafts come before the new
    one.
    """
    lane = tl.arange(0, BLOCK)
    for start in range(0, num_rows, BLOCK):
        row = start + lane
        tl.store(lengths_ptr + row, tl.zeros([BLOCK], tl.int32), mask=row < num_rows)
    # all lengths must be 0 before threads write some of them below
    tl.debug_barrier()
    for start in range(0, num_requests, BLOCK):
        request = start + lane
        inside = request < num_requests
        batch_row = tl.load(next_ptr + STRIDE + request, mask=inside, other=-1)
        positions = next_ptr + 2 * STRIDE + request
        position = tl.load(positions, mask=inside, other=0)
        cached = tl.load(next_ptr + 3 * STRIDE + request, mask=inside, other=0)
        tl.store(positions, position + 1, mask=inside)
        tl.store(cached_ptr + batch_row, cached + depth - 1, mask=batch_row >= 0)
        tl.store(lengths_ptr + batch_row, tl.full([BLOCK], 1, tl.int32), mask=batch_row >= 0)
