"""Launches of dense attention for prompts, and their tile sizes."""

from __future__ import annotations

from collections.abc import Iterator
from math import e, log2
from typing import NamedTuple

from fd_dsa.ops.arrays import cache_format, matmul
from fd_dsa.ops.dense_kernels import kernel_arguments
from fd_dsa.ops.head_gemm import head_gemm
from fd_dsa.ops.key_bounds import prompt_windows
from fd_dsa.ops.mla.prompt_kernel import (
    attend_prompts_kernel,
    gather_keys_kernel,
    list_absorbed_kernel,
)
from fd_dsa.ops.split_sums import Tiling
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2

_GATHERED, _LISTED = 16, 16


CANDIDATES = (
    Tiling(128, 64, 8, 3),
    Tiling(128, 128, 8, 2),
    Tiling(128, 64, 8, 2),
    Tiling(64, 64, 4, 2),
    Tiling(64, 64, 4, 3),
    Tiling(128, 64, 8, 4),
    Tiling(256, 64, 8, 2),
    Tiling(128, 32, 8, 3),
    Tiling(64, 128, 4, 2),
    Tiling(128, 32, 8, 2),
    Tiling(64, 32, 4, 2),
    Tiling(32, 32, 4, 2),
)
"""Tiles in order of preference, timed by benchmarks/prompt_attention.py.

The rows of a tile are tokens of a program, and the columns are keys.
"""


class Group(NamedTuple):
    """Rows of a step whose keys are in memory at the same time.

    Attributes:
        first_row, end_row: range of batch rows. It may include rows that do not attend densely.
        num_keys: keys of all rows of the group.
        counts: tokens of each row that attends densely.
    """

    first_row: int
    end_row: int
    num_keys: int
    counts: tuple[int, ...]


def fitting(nope: int, rope: int, values: int, shared_bytes: int) -> Iterator[Tiling]:
    """Yield the candidates whose operands fit the shared memory of a block."""
    keys = next_power_of_2(nope) + rope
    for tiling in CANDIDATES:
        stage = 2 * tiling.columns * (keys + next_power_of_2(values))
        if 2 * tiling.rows * keys + tiling.num_stages * stage <= shared_bytes:
            yield tiling


def list_absorbed(
    step: ForwardMeta,
    index_topk: int,
    tokens: Tensor,
    batch_ids: Tensor,
    left: Tensor,
    rows: int,
    count: Tensor | None = None,
) -> None:
    """List the tokens of a step that do not attend densely, in their order.

    Args:
        step: metadata of the step.
        index_topk: maximum keys of a token that attends densely.
        tokens: int32 [n], filled with flat tokens, then -1.
        batch_ids: int32 [n], filled with the row of each token, then -1.
        left: int32 [rows of the step], filled with the prompt tokens of each row that are listed.
        rows: a power of two, at least the rows of the step.
        count: int32 [1], filled with the number of keys that all dense tokens see; None = nowhere.

    Cost: one launch.
    """
    num_places = tokens.shape[0]
    list_absorbed_kernel[(-(-num_places // _LISTED),)](
        *(step.seq_lens_encoder, step.seq_lens_decoder, step.seq_lens_this_time),
        *(tokens, batch_ids, left, count, left.shape[0], num_places, index_topk),
        ROWS=rows,
        PLACES=_LISTED,
        num_warps=4,
    )


def gather_keys(
    cache: Tensor,
    step: ForwardMeta,
    group: Group,
    index_topk: int,
    latents: Tensor,
    rope: Tensor,
    rows: int,
) -> None:
    """Gather the keys of a group from the cache.

    Args:
        cache: bfloat16 or int16 [num_blocks, ..., block_size, width], or fp8_ds_mla records.
        step: metadata of the step.
        group: rows of the step.
        index_topk: maximum keys of a token that attends densely.
        latents: bfloat16 [num_keys, rank], filled.
        rope: bfloat16 [num_keys, rope_dim], filled.
        rows: a power of two, at least the rows of the step.

    Cost: one launch.
    """
    num_blocks, block_size = cache.shape[0], cache.shape[-2]
    gather_keys_kernel[(-(-group.num_keys // _GATHERED),)](
        *(cache, step.block_tables, step.seq_lens_encoder, step.seq_lens_decoder, latents, rope),
        *(group.first_row, group.end_row, index_topk, step.block_tables.shape[1], num_blocks),
        BLOCK_SIZE=block_size,
        RANK=latents.shape[1],
        ROPE=rope.shape[1],
        RANK_PADDED=next_power_of_2(latents.shape[1]),
        FP8=cache_format(cache).is_fp8,
        ROWS=rows,
        KEYS=_GATHERED,
        num_warps=4,
    )


def keys_and_values(
    latents: Tensor, k_b: Tensor, v_b: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Project latents to keys and values of every head, [num_keys, heads, width] each.

    Args:
        latents: [num_keys, rank].
        k_b: up-projection of keys, [heads, width, rank].
        v_b: up-projection of values, [heads, rank, width].
        count: int32 [1], number of keys on the device. Results of later ones are arbitrary. None =
            all keys.
    """
    if count is not None:
        keys = head_gemm(latents, k_b, in_first=False, count=count)
        return keys, head_gemm(latents, v_b, count=count)
    heads, width, rank = k_b.shape
    keys = matmul(latents, k_b.reshape([heads * width, rank]), transpose_y=True)
    return keys, head_gemm(latents, v_b)


def attend_prompts(
    q: Tensor,
    cos_sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rope: Tensor,
    step: ForwardMeta,
    group: Group,
    out: Tensor,
    *,
    index_topk: int,
    softmax_scale: float,
    rows: int,
    tiling: Tiling,
    round_scales: bool = False,
) -> None:
    """Attend for the dense tokens of a group, see `prompt_kernel`.

    Scores and sums are float32. Rotated queries and weights are rounded to bfloat16.

    Args:
        q: bfloat16 [num_tokens, heads, nope + rope_dim], the last part not yet rotated.
        cos_sin: float32 [num_tokens, rope_dim], cos, then sin.
        keys, values: keys and values of the group, see `keys_and_values`. Both may also be
            [num_keys, heads * width].
        rope: bfloat16 [num_keys, rope_dim].
        step: metadata of the step.
        group: rows of the step.
        out: bfloat16 [num_tokens, heads, width], or Fp8Rows, see `head_gemm`. Only rows of the
            group's dense tokens are written.
        index_topk: maximum keys of a token that attends densely.
        softmax_scale: factor of the scores.
        rows: see `gather_keys`.
        tiling: one of `CANDIDATES`.
        round_scales: True if the scales of Fp8Rows are powers of two.

    Cost: one launch.
    """
    _, heads, width = q.shape
    rope_dim, value_width = rope.shape[1], values.shape[-1]
    nope = width - rope_dim
    tiles = sum(-(-count // tiling.rows) for count in group.counts)
    offsets, key_starts, encoder = prompt_windows(step)
    attend_prompts_kernel[tiles, heads](
        *(q, cos_sin, keys, values, rope),
        *(encoder, step.seq_lens_decoder, step.cu_seqlens_q),
        *(step.position_ids, offsets, key_starts),
        *kernel_arguments(out),
        *(softmax_scale * log2(e), group.first_row, group.end_row, index_topk),
        NOPE=nope,
        HALF=rope_dim // 2,
        VALUES=value_width,
        NOPE_PADDED=max(16, next_power_of_2(nope)),
        VALUES_PADDED=max(16, next_power_of_2(value_width)),
        ROUND_SCALES=round_scales,
        ROWS=rows,
        **tiling.options,
    )
