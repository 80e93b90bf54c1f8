"""Which drafts stand: those that are the token drawn in their place, and so are all before them."""

from __future__ import annotations

from fd_dsa.ops._triton import step_kernel
from fd_dsa.ops.sampling import parameters as places

import triton.language as tl  # isort: skip

_REJECTED = tl.constexpr(places.REJECTED)


@step_kernel()
def verify_kernel(
    tokens_ptr,
    ids_ptr,
    sampled_ptr,
    slots_ptr,
    positions_ptr,
    firsts_ptr,
    counts_ptr,
    going_on_ptr,
    STRIDE: tl.constexpr,
    MOST: tl.constexpr,
):
    """Request `program 0`: mark what is drawn after its first wrong draft, and where it goes on.

    Its tokens are those of rows `first` to `first + count`, all but the first after a draft. Of
    `going_on` the first row has the flat token that the next draft comes after, the second the slot
    and the third the position of that draft; without a request the slot is -1.
    """
    program = tl.program_id(0)
    first = tl.load(firsts_ptr + program)
    last, slot, position = first * 0, first * 0 - 1, first * 0
    if first >= 0:
        count = tl.load(counts_ptr + program)
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
    tl.store(going_on_ptr + program, last)
    tl.store(going_on_ptr + STRIDE + program, slot)
    tl.store(going_on_ptr + 2 * STRIDE + program, position)
