"""Kernel of the indexer's projections: both products in one launch.

With few tokens the time is that of reading the weights, 192 columns in V3.2. So the sum over the
hidden size is split among programs until they fill the device. Many tokens fill it without splits.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.ops.arrays import outer_strides
from fd_dsa.ops.device_functions import stored, stored_values
from fd_dsa.ops.split_sums import rows_of_tiles, scratch_beside, splits_of, sum_of_parts
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton.language as tl  # isort: skip

NUM_PARTIALS = 1 << 20
"""Number of float32 partial sums: 4 MiB, a small part of a Hopper GPU's L2 cache."""

_NAME = "project_indexer"
Tiling = tuple[int, int, int, int, int, int]
MAX_SPLIT_TOKENS = 512


def configuration(num_tokens: int) -> Tiling:
    """Return the fastest tiling of benchmarks/tune.py for a number of tokens, in bfloat16.

    Returns:
        BLOCK_TOKENS, BLOCK_COLUMNS, BLOCK_HIDDEN, programs that share the hidden size, num_warps
        and num_stages.
    """
    if num_tokens <= 64:
        return 16, 32, 128, 14, 4, 5
    if num_tokens <= 128:
        return 64, 32, 128, 7, 4, 5
    if num_tokens <= MAX_SPLIT_TOKENS:
        return 64, 64, 128, 7, 8, 4
    return (64, 32, 128, 1, 4, 4) if num_tokens <= 1024 else (64, 64, 64, 1, 4, 5)


@step_kernel(
    strided=("hidden_ptr", "wk_ptr", "weights_proj_ptr"),
    specialized=("hidden_stride", "wk_stride", "weights_proj_stride"),
    waits=True,
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
    scratch_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Project a tile of tokens to a tile of columns, over a part of the hidden size.

    The axes of the grid are tokens, columns of wk and then of weights_proj, and parts of the hidden
    size with STEPS tiles each. `scratch_ptr`: see `sum_of_parts`.
    """
    wait_for_inputs()
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
    begin = tl.program_id(2) * (STEPS * BLOCK_HIDDEN)
    total = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    for step in range(STEPS):
        row = begin + step * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        if HIDDEN % (SPLITS * STEPS * BLOCK_HIDDEN) == 0:
            x = tl.load(hidden + row[None, :], mask=live, other=0.0)
            w = tl.load(weight + row[:, None] * weight_stride, mask=inside, other=0.0)
        else:
            here = row < HIDDEN
            x = tl.load(hidden + row[None, :], mask=live & here[None, :], other=0.0)
            rows = weight + row[:, None] * weight_stride
            w = tl.load(rows, mask=inside & here[:, None], other=0.0)
        x, w = stored_values(x, WIDE), stored_values(w, WIDE)
        total = tl.dot(x, w, acc=total, input_precision="ieee")
    start_next()
    mask = live & inside
    last = True
    if SPLITS > 1:
        counter = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        total, last = sum_of_parts(total, scratch_ptr, counter, tl.program_id(2), SPLITS, mask)
    if last:
        if is_key:
            out = index_k_ptr + token[:, None] * WIDTH + column[None, :]
            tl.store(out, stored(total, index_k_ptr), mask=mask)
        else:
            tl.store(weights_ptr + token[:, None] * HEADS + column[None, :], total, mask=mask)


def project_indexer(
    hidden_states: Tensor,
    wk: Tensor | None,
    weights_proj: Tensor,
    out: tuple[Tensor, Tensor],
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Project on a device in one launch, see `fd_dsa.ops.indexer_projection`."""
    num_tokens = hidden_states.shape[0]
    if num_tokens:
        rows = rows_of_tiles(num_tokens)
        if scratch is None and rows <= MAX_SPLIT_TOKENS:
            scratch = scratch_beside(out[1], _NAME, NUM_PARTIALS)
        arguments = kernel_arguments(hidden_states, wk, weights_proj, out, scratch)
        grid, options = launch_options(arguments, configuration(rows))
        project_indexer_kernel[grid](**arguments, **options)
    return out


def kernel_arguments(
    hidden_states: Tensor,
    wk: Tensor | None,
    weights_proj: Tensor,
    out: tuple[Tensor, Tensor],
    scratch: Tensor | None,
) -> dict[str, Any]:
    """Return the arguments of `project_indexer_kernel` by name, without its tiling.

    Raises:
        ShapeError: the values of a row have gaps.
    """
    width, keys = (0, out[1]) if wk is None else (wk.shape[1], out[0])
    # a width of 0 columns, so that this pointer is not read
    wk = weights_proj if wk is None else wk
    matrices = ("hidden", hidden_states), ("wk", wk), ("weights_proj", weights_proj)
    strides = {name: outer_strides(_NAME, name, matrix)[0] for name, matrix in matrices}
    bfloat16 = str(hidden_states.dtype).endswith("bfloat16")
    return {
        "hidden_ptr": hidden_states,
        "hidden_stride": strides["hidden"],
        "wk_ptr": wk,
        "wk_stride": strides["wk"],
        "weights_proj_ptr": weights_proj,
        "weights_proj_stride": strides["weights_proj"],
        "index_k_ptr": keys,
        "weights_ptr": out[1],
        "scratch_ptr": scratch,
        "num_tokens": hidden_states.shape[0],
        "HIDDEN": hidden_states.shape[1],
        "WIDTH": width,
        "HEADS": weights_proj.shape[1],
        "WIDE": tl.bfloat16 if bfloat16 else tl.float32,
    }


def launch_options(
    arguments: dict[str, Any], tiling: Tiling
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid and the tile sizes of a launch, without splits if there is no scratch."""
    tokens, columns, hidden, splits, num_warps, num_stages = tiling
    if arguments["WIDE"] is tl.float32:
        # products without tensor cores hold a whole tile in registers
        tokens, columns, hidden = min(tokens, 32), min(columns, 32), 32
    hidden = min(hidden, max(16, next_power_of_2(arguments["HIDDEN"])))
    tiles = -(-arguments["WIDTH"] // columns) + -(-arguments["HEADS"] // columns)
    token_tiles = -(-arguments["num_tokens"] // tokens)
    steps, most = -(-arguments["HIDDEN"] // hidden), splits
    if arguments["scratch_ptr"] is None:
        most = 1
    sums = token_tiles * tiles, tokens * columns
    splits, steps_of_part = splits_of(steps, *sums, most, NUM_PARTIALS)
    options = {
        "BLOCK_TOKENS": tokens,
        "BLOCK_COLUMNS": columns,
        "BLOCK_HIDDEN": hidden,
        "STEPS": steps_of_part,
        "SPLITS": splits,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    return (token_tiles, tiles, splits), options
