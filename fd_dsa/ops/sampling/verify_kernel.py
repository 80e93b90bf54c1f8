"""Which drafts stand: those that are the token drawn in their place, and so are all before them.

The host plans the next step before it knows how many do, as if all did. What follows from their
number is corrected here.
"""

from __future__ import annotations

from fd_dsa.ops.sampling import token_buffer
from fd_dsa.ops.sampling.values import FLAGS, PENALIZED, RECORD
from fd_dsa.ops.step_kernel import step_kernel

import triton.language as tl  # isort: skip

_REJECTED = tl.constexpr(token_buffer.REJECTED)


@step_kernel()
def verify_kernel(
    tokens_ptr,
    ids_ptr,
    sampled_ptr,
    slots_ptr,
    positions_ptr,
    firsts_ptr,
    cached_ptr,
    lengths_ptr,
    going_on_ptr,
    newest_ptr,
    records_ptr,
    outputs_ptr,
    STRIDE: tl.constexpr,
    MOST: tl.constexpr,
    VOCAB: tl.constexpr,
):
    """Request `program 0`: mark what is drawn after its first wrong draft, and where it goes on.

    Its tokens are those of rows from `first` up to the next one's, all but one after a draft. Of
    `going_on` the first row has the flat token that the next draft comes after, the second the slot
    and the third the position of that draft, the fourth how many tokens the cache then has; without
    a request the slot is -1. `newest` gets the last token that stands. `outputs` counts all tokens
    that do, where the slot has penalties.
    """
    program = tl.program_id(0)
    first = tl.load(firsts_ptr + program)
    last, slot, position, cached = first * 0, first * 0 - 1, first * 0, first * 0
    # after those of all requests comes the number of rows, then -1
    count = tl.load(firsts_ptr + program + 1) - first - 1
    if count >= 0:
        accepted = first * 0
        for place in range(MOST):
            # a row that is there is read in any case
            row = first + tl.minimum(place, count)
            token = tl.load(tokens_ptr + row)
            draft = tl.load(ids_ptr + tl.load(sampled_ptr + row) + tl.where(place < count, 1, 0))
            stands = (accepted == place) & (place < count) & (token >= 0) & (token == draft)
            accepted += stands.to(tl.int32)
            if (place < count) & (accepted <= place):
                tl.store(tokens_ptr + row + 1, _REJECTED)
        last = tl.load(sampled_ptr + first + accepted)
        slot = tl.load(slots_ptr + first)
        position = tl.load(positions_ptr + first + accepted) + 1
        cached = tl.load(cached_ptr + slot) + tl.load(lengths_ptr + slot) - (count - accepted)
        tl.store(newest_ptr + program, tl.load(tokens_ptr + first + accepted))
        if (tl.load(records_ptr + slot.to(tl.int64) * RECORD + FLAGS) & PENALIZED) != 0:
            for place in range(MOST + 1):
                token = tl.load(tokens_ptr + first + tl.minimum(place, accepted))
                cell = outputs_ptr + slot.to(tl.int64) * VOCAB + token
                tl.atomic_add(cell, 1, mask=(place <= accepted) & (token >= 0))
    tl.store(going_on_ptr + program, last)
    tl.store(going_on_ptr + STRIDE + program, slot)
    tl.store(going_on_ptr + 2 * STRIDE + program, position)
    tl.store(going_on_ptr + 3 * STRIDE + program, cached)


FOLLOW_BLOCK = 256


@step_kernel()
def follow_kernel(
    ids_ptr,
    tokens_ptr,
    known_ptr,
    num_ids,
    cached_ptr,
    follows_ptr,
    slots_ptr,
    positions_ptr,
    num_rows,
    num_draws,
    BLOCK: tl.constexpr,
):
    """Resolve the pending tokens of a step. Program p handles ids [p * BLOCK, (p + 1) * BLOCK).

    A value of -1 - i, made by `staged_ids`, becomes token i of the token buffer. Program 0 also
    corrects all rows: row i continues request `follows[i]` of the step before, if any, which has
    `known` tokens in the cache. The host has planned with the maximum, so the positions of the
    slot's samples become smaller by the difference.
    """
    program, lane = tl.program_id(0), tl.arange(0, BLOCK)
    place = program * BLOCK + lane
    token = tl.load(ids_ptr + place, mask=place < num_ids, other=0)
    drawn = tl.load(tokens_ptr + (-1 - token), mask=token < 0, other=0)
    tl.store(ids_ptr + place, drawn.to(tl.int32), mask=token < 0)
    if program == 0:
        for start in range(0, num_draws, BLOCK):
            row = start + lane
            slot = tl.load(slots_ptr + row, mask=row < num_draws, other=-1)
            position = tl.load(positions_ptr + row, mask=slot >= 0, other=0)
            source = tl.load(follows_ptr + slot, mask=slot >= 0, other=-1)
            planned = tl.load(cached_ptr + slot, mask=source >= 0, other=0)
            known = tl.load(known_ptr + source, mask=source >= 0, other=0)
            tl.store(positions_ptr + row, position - (planned - known), mask=slot >= 0)
        # what other threads have read is written below
        tl.debug_barrier()
        for start in range(0, num_rows, BLOCK):
            row = start + lane
            source = tl.load(follows_ptr + row, mask=row < num_rows, other=-1)
            known = tl.load(known_ptr + source, mask=source >= 0, other=0)
            tl.store(cached_ptr + row, known, mask=source >= 0)


@step_kernel()
def extend_kernel(
    going_on_ptr,
    cached_ptr,
    lengths_ptr,
    num_requests,
    num_rows,
    depth,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the step that a further draft is made in: one token of each request.

    `going_on` is that of `verify_kernel`, whose slots ascend, and whose positions become those of
    the new drafts. A request has the row of its slot; `depth` drafts are before the new one.
    """
    lane = tl.arange(0, BLOCK)
    for start in range(0, num_rows, BLOCK):
        row = start + lane
        tl.store(lengths_ptr + row, tl.zeros([BLOCK], tl.int32), mask=row < num_rows)
    # other threads write some of them below
    tl.debug_barrier()
    for start in range(0, num_requests, BLOCK):
        request = start + lane
        inside = request < num_requests
        slot = tl.load(going_on_ptr + STRIDE + request, mask=inside, other=-1)
        positions = going_on_ptr + 2 * STRIDE + request
        position = tl.load(positions, mask=inside, other=0)
        cached = tl.load(going_on_ptr + 3 * STRIDE + request, mask=inside, other=0)
        tl.store(positions, position + 1, mask=inside)
        tl.store(cached_ptr + slot, cached + depth - 1, mask=slot >= 0)
        tl.store(lengths_ptr + slot, tl.full([BLOCK], 1, tl.int32), mask=slot >= 0)
