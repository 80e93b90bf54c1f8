"""Kernel that makes the input of the layer for multi-token prediction (MTP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fd_dsa.ops.dense_kernels import empty_beside
from fd_dsa.ops.device_functions import stored, widened
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton.language as tl  # isort: skip

if TYPE_CHECKING:
    from fd_dsa.ops.device_matrix import DeviceNorm


@step_kernel(waits=True)
def mtp_inputs_kernel(
    table_ptr,
    ids_ptr,
    positions_ptr,
    hidden_ptr,
    token_weight_ptr,
    hidden_weight_ptr,
    out_ptr,
    table_rows,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm half `program 1` of row `program 0`: the token's embedding or the hidden state."""
    wait_for_inputs()
    start_next()
    row, half = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if half == 0:
        # a vector, because some interpreters support no mask of a scalar and a block
        source = tl.load(ids_ptr + row).to(tl.int64) + tl.zeros([BLOCK], tl.int64)
        position = tl.load(positions_ptr + row) + tl.zeros([BLOCK], tl.int64)
        exists = (source >= 0) & (source < table_rows) & (position > 0)
        x = widened(tl.load(table_ptr + source * WIDTH + column, mask=inside & exists, other=0.0))
        weight = tl.load(token_weight_ptr + column, mask=inside, other=0.0)
    else:
        x = widened(tl.load(hidden_ptr + row * WIDTH + column, mask=inside, other=0.0))
        weight = tl.load(hidden_weight_ptr + column, mask=inside, other=0.0)
    mean_square = tl.sum(x * x, axis=0) / WIDTH
    normed = stored(x * (1.0 / tl.sqrt_rn(mean_square + epsilon)) * weight, out_ptr)
    tl.store(out_ptr + (2 * row + half) * WIDTH + column, normed, mask=inside)


def mtp_inputs(
    table: Tensor,
    next_ids: Tensor,
    positions: Tensor,
    hidden: Tensor,
    token_norm: DeviceNorm,
    hidden_norm: DeviceNorm,
) -> Tensor:
    """Return concat(norm(table[next_ids]), norm(hidden)): [n, 2 * width].

    The embedding is 0 at position 0 and for an id outside the table. The result has the dtype of
    the table.

    Args:
        table: float32 or bfloat16 [vocab_size, width], embeddings.
        next_ids: int32 or int64 [n], the token after each row's.
        positions: int64 [n].
        hidden: [n, width] of the dtype of the table.
        token_norm, hidden_norm: norms with the same epsilon.

    Cost: one launch.
    """
    rows, width = hidden.shape
    out = empty_beside(table, rows, 2 * width)
    block = next_power_of_2(width)
    mtp_inputs_kernel[(rows, 2)](
        table, next_ids, positions, hidden, token_norm.weight, hidden_norm.weight, out,
        table.shape[0], token_norm.epsilon, WIDTH=width, BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return out
