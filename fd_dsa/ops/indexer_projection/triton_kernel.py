"""Projections of the indexer on a device: both products in one launch.

Few tokens make this a read of the weights, 192 columns of them in V3.2. Columns are cut finely, so
that a dozen programs read at once, and each sums over the whole hidden size: no second pass, no
scratch memory, and the same bits every time. It leaves most of the device to a product beside it.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops._triton import stored_values
from fd_dsa.ops._triton_fp8 import stored
from fd_dsa.triton_runtime import paddle_jit

import triton  # isort: skip
import triton.language as tl  # isort: skip

_NAME = "project_indexer"
# BLOCK_TOKENS, _COLUMNS and _HIDDEN, num_warps, num_stages: what benchmarks/overlap.py times
CANDIDATES = (
    *((16, 16, 128, 4, 4), (16, 16, 256, 4, 4), (16, 16, 256, 8, 4), (16, 16, 512, 8, 3)),
    *((16, 32, 256, 4, 4), (32, 32, 128, 4, 4), (32, 32, 256, 8, 3), (64, 32, 128, 4, 4)),
    *((64, 64, 64, 4, 5), (64, 64, 128, 8, 3), (128, 64, 64, 8, 4)),
)


def configuration(num_tokens: int) -> tuple[int, int, int, int, int]:
    """One of CANDIDATES for this many tokens, in bfloat16."""
    if num_tokens <= 64:
        return 16, 16, 256, 4, 4
    return (32, 32, 128, 4, 4) if num_tokens <= 256 else (64, 64, 64, 4, 5)


@paddle_jit(
    do_not_specialize=("num_tokens",),
    contiguous=("index_k_ptr", "weights_ptr"),
)
def project_indexer_kernel(
    hidden_ptr,
    hidden_stride,
    wk_ptr,
    wk_stride,
    weights_proj_ptr,
    weights_proj_stride,
    index_k_ptr,
    weights_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """See `project_indexer`; the second axis of the grid is the columns of wk, then the heads."""
    key_tiles: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tile = tl.program_id(1)
    is_key = tile < key_tiles
    if is_key:
        weight_ptr, weight_stride, columns = wk_ptr, wk_stride, WIDTH
    else:
        weight_ptr, weight_stride, columns = weights_proj_ptr, weights_proj_stride, HEADS
        tile -= key_tiles
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live, inside = (token < num_tokens)[:, None], (column < columns)[None, :]
    hidden = hidden_ptr + token[:, None] * hidden_stride
    weight = weight_ptr + column[None, :]
    total = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, HIDDEN, BLOCK_HIDDEN):
        row = first + tl.arange(0, BLOCK_HIDDEN)
        if HIDDEN % BLOCK_HIDDEN == 0:
            x = tl.load(hidden + row[None, :], mask=live, other=0.0)
            w = tl.load(weight + row[:, None] * weight_stride, mask=inside, other=0.0)
        else:
            here = row < HIDDEN
            x = tl.load(hidden + row[None, :], mask=live & here[None, :], other=0.0)
            rows = weight + row[:, None] * weight_stride
            w = tl.load(rows, mask=inside & here[:, None], other=0.0)
        x, w = stored_values(x, WIDE), stored_values(w, WIDE)
        total = tl.dot(x, w, acc=total, input_precision="ieee")
    mask = live & inside
    if is_key:
        out = index_k_ptr + token[:, None] * WIDTH + column[None, :]
        tl.store(out, stored(total, index_k_ptr), mask=mask)
    else:
        tl.store(weights_ptr + token[:, None] * HEADS + column[None, :], total, mask=mask)


def project_indexer(
    hidden_states: Any, wk: Any, weights_proj: Any, out: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    """See `fd_dsa.ops.indexer_projection.project_indexer`."""
    if out is None:
        out = _allocated(hidden_states, wk.shape[1], weights_proj.shape[1])
    arguments = kernel_arguments(hidden_states, wk, weights_proj, out)
    if arguments["num_tokens"]:
        tiling = configuration(arguments["num_tokens"])
        grid, options = launch_options(arguments, tiling)
        project_indexer_kernel[grid](**arguments, **options)
    return out


def kernel_arguments(
    hidden_states: Any, wk: Any, weights_proj: Any, out: tuple[Any, Any]
) -> dict[str, Any]:
    """Arguments of `project_indexer_kernel` by name, but for its tiling.

    Raises:
        ShapeError: the values of a row do not lie side by side.
    """
    strides = {}
    given = {"hidden": hidden_states, "wk": wk, "weights_proj": weights_proj}
    for name, matrix in given.items():
        strides[name], step = matrix.stride()
        if step != 1 and matrix.shape[1] > 1 and matrix.shape[0]:
            raise ShapeError(f"{_NAME}: values of a row of {name} lie {step} apart, wanted 1")
    bfloat16 = str(hidden_states.dtype).endswith("bfloat16")
    return {
        "hidden_ptr": hidden_states,
        "hidden_stride": strides["hidden"],
        "wk_ptr": wk,
        "wk_stride": strides["wk"],
        "weights_proj_ptr": weights_proj,
        "weights_proj_stride": strides["weights_proj"],
        "index_k_ptr": out[0],
        "weights_ptr": out[1],
        "num_tokens": hidden_states.shape[0],
        "HIDDEN": hidden_states.shape[1],
        "WIDTH": wk.shape[1],
        "HEADS": weights_proj.shape[1],
        "WIDE": tl.bfloat16 if bfloat16 else tl.float32,
    }


def launch_options(
    arguments: dict[str, Any], tiling: tuple[int, int, int, int, int]
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile sizes of a launch with one of CANDIDATES."""
    tokens, columns, hidden, num_warps, num_stages = tiling
    if arguments["WIDE"] is tl.float32:
        # products without tensor cores keep a whole tile in registers
        tokens, columns, hidden = min(tokens, 32), min(columns, 32), 32
    hidden = min(hidden, max(16, triton.next_power_of_2(arguments["HIDDEN"])))
    tiles = -(-arguments["WIDTH"] // columns) + -(-arguments["HEADS"] // columns)
    options = {
        "BLOCK_TOKENS": tokens,
        "BLOCK_COLUMNS": columns,
        "BLOCK_HIDDEN": hidden,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    return (-(-arguments["num_tokens"] // tokens), tiles), options


def _allocated(hidden_states: Any, width: int, heads: int) -> tuple[Any, Any]:
    """Memory for the results beside the hidden states."""
    import paddle

    num_tokens = hidden_states.shape[0]
    index_k = hidden_states.new_empty([num_tokens, width])
    return index_k, hidden_states.new_empty([num_tokens, heads], dtype=paddle.float32)
