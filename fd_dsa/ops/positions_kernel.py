"""Kernel that writes the positions of a step's tokens, with one program for each row."""

from __future__ import annotations

from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor

import triton.language as tl  # isort: skip

_BLOCK = tl.constexpr(256)


@step_kernel()
def position_ids_kernel(seq_lens_decoder_ptr, seq_lens_this_time_ptr, position_ids_ptr, num_tokens):
    """Write the positions of row `program 0`, after a sum of the tokens of earlier rows."""
    row = tl.program_id(0)
    first = tl.full([], 0, tl.int32)
    for start in range(0, row, _BLOCK):
        other = start + tl.arange(0, _BLOCK)
        first += tl.sum(tl.load(seq_lens_this_time_ptr + other, mask=other < row, other=0), axis=0)
    known = tl.load(seq_lens_decoder_ptr + row)
    new = tl.load(seq_lens_this_time_ptr + row)
    for start in range(0, new, _BLOCK):
        j = start + tl.arange(0, _BLOCK)
        mask = (j < new) & (first + j < num_tokens)
        tl.store(position_ids_ptr + first + j, known + j, mask=mask)


def position_ids(
    seq_lens_encoder: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    position_ids: Tensor,
) -> None:
    """Write positions as `fd_dsa.ops.positions.position_ids`, in one launch."""
    num_rows = seq_lens_this_time.shape[0]
    if num_rows:
        tensors = seq_lens_decoder, seq_lens_this_time, position_ids
        position_ids_kernel[(num_rows,)](*tensors, position_ids.shape[0])
