"""Attention of DeepSeek-V4 on a device over a window of keys and compressed entries.

In a step with few tokens the keys of a token are split among programs until they fill the device. A
second launch combines the partial results of the splits, in their order. With more tokens a kernel
of custom_ops/ attends, if it supports the device and the sizes.
"""

from __future__ import annotations

from fd_dsa.device.allocation import Allocate
from fd_dsa.errors import LaunchError
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.dense_kernels import empty_beside, empty_fp8_rows, kernel_arguments
from fd_dsa.ops.mla.tensor_core import COMBINE_CONFIGS, MAX_SPLITS, Partials
from fd_dsa.ops.split_sums import rows_of_tiles
from fd_dsa.ops.v4_attend_cuda import kernel_for, suits
from fd_dsa.ops.v4_attend_kernel import attend_v4_kernel, combine_v4_kernel
from fd_dsa.ops.v4_places import Entries, PlainKeys, TokenPlaces, Windows
from fd_dsa.tensor import Fp8Rows, Tensor
from fd_dsa.triton_runtime import next_power_of_2
from fd_dsa.triton_runtime.device_api import traits_for

import triton.language as tl  # isort: skip

# query heads and keys that are multiplied at a time
_HEADS = 16
_KEYS = {"float32": 16, "bfloat16": 32}
# heads of a program if tokens fill the GPU without splits, and the min number of such tokens; more
# heads read each key less often
_MANY_HEADS, _MANY_TOKENS = 64, 256
# keys and stages of such a program over plain keys or records, and its shared memory
_MANY_PLAIN = (64, 2, 217 << 10), (32, 3, 160 << 10)
# records are dequantised in registers, which do not hold more
_MANY_RECORDS = ((32, 1, 108 << 10),)
# programs that an H100 or H200 runs at once: two of a multiprocessor
_PROGRAMS = 256


def new_partials(width: int, allocate: Allocate) -> Partials:
    """Allocate memory for splits, which suffices for every step."""
    rows = _PROGRAMS * _HEADS
    return Partials(allocate((rows * width,), "float32"), allocate((rows,), "float32"))


def num_programs(num_tokens: int, num_heads: int) -> int:
    """Return the programs of a step without splits, each with 16 heads.

    All numbers of tokens between two powers of two have the same. So a captured step with padding
    has the splits, the kernel and the bits of the step without.
    """
    return -(-num_heads // _HEADS) * next_power_of_2(rows_of_tiles(num_tokens))


def num_splits(num_tokens: int, num_heads: int, max_tiles: int) -> int:
    """Return the number of programs that share the keys of a token.

    Args:
        num_tokens, num_heads: shape of the queries.
        max_tiles: maximum number of tiles of a token's keys.
    """
    programs = num_programs(num_tokens, num_heads)
    return max(1, min(MAX_SPLITS, max_tiles, _PROGRAMS // programs))


def _tile(
    kind: str, num_tokens: int, num_heads: int, shared_bytes: int, *, is_plain: bool
) -> dict[str, int]:
    """Return heads and keys of a program, and the options of its launch.

    Args:
        shared_bytes: maximum shared memory of a program.
        is_plain: True if keys are no records.
    """
    if kind == "bfloat16" and num_tokens >= _MANY_TOKENS and num_heads > _HEADS:
        for keys, stages, needed in _MANY_PLAIN if is_plain else _MANY_RECORDS:
            if needed <= shared_bytes:
                heads = min(_MANY_HEADS, next_power_of_2(num_heads))
                return {"HEADS": heads, "KEYS": keys, "num_warps": 8, "num_stages": stages}
    return {"HEADS": _HEADS, "KEYS": _KEYS[kind], "num_warps": 4, "num_stages": 1}


def attend_v4(
    q: Tensor,
    windows: Windows,
    entries: Entries | None,
    sinks: Tensor,
    cos_sin: Tensor,
    places: TokenPlaces,
    epsilon: float,
    partials: Partials,
    round_scales: bool | None = None,
    plain: PlainKeys | None = None,
) -> Tensor | Fp8Rows:
    """Attend to the window and the entries of each token, [num_tokens, num_heads * width].

    Args:
        q: float32 or bfloat16 [num_tokens, num_heads * width], neither normed nor rotated; there
            may be gaps between rows.
        entries: None in a layer with windows only.
        sinks: float32 [num_heads].
        cos_sin: float32 [num_positions, rotated channels], the last ones of a head; cos, then sin.
        epsilon: term added to the mean square of a query.
        partials: memory of `new_partials`.
        round_scales: None returns the type of `q`. Otherwise the result is Fp8Rows with such
            scales; the width is then a multiple of 128.
        plain: values of the records of some rows. Only a kernel of custom_ops/ reads them, so
            `suits` and `kernel_for` must allow it for these queries.

    Cost: one or two launches. GEMM operands have the type of `q`, sums are in float32.

    Raises:
        LaunchError: `plain` is given, and Triton's kernel attends.
    """
    (tokens, columns), heads = q.shape, sinks.shape[0]
    out = (empty_beside if round_scales is None else empty_fp8_rows)(q, tokens, columns)
    if not tokens:
        return out
    shape = num_programs(tokens, heads), columns // heads, cos_sin.shape[1]
    own = kernel_for(q) if suits(dtype_name(q.dtype), *shape, round_scales) else None
    given = q, windows, entries, sinks, cos_sin, places, epsilon
    if own is not None:
        own(*given, out, plain)
    elif plain is not None:
        raise LaunchError("attend_v4: Triton's kernel reads no plain keys; pass records alone")
    else:
        _attend_by_triton(*given, partials, out, round_scales=bool(round_scales))
    return out


def _attend_by_triton(
    q: Tensor,
    windows: Windows,
    entries: Entries | None,
    sinks: Tensor,
    cos_sin: Tensor,
    places: TokenPlaces,
    epsilon: float,
    partials: Partials,
    out: Tensor | Fp8Rows,
    *,
    round_scales: bool,
) -> None:
    """Launch Triton's kernels, arguments as for `attend_v4`."""
    (tokens, columns), heads, kind = q.shape, sinks.shape[0], dtype_name(q.dtype)
    width, rope = columns // heads, cos_sin.shape[1]
    form = {"ROPE": rope, "WIDTH": width, "ROUND_SCALES": round_scales}
    wide = tl.float32 if kind == "float32" else tl.bfloat16
    pool, ratio, slots = entries or (None, 1, None)
    padded = max(16, next_power_of_2(width))
    per_block, in_table = 1 if pool is None else pool.shape[1], places.block_table.shape[1]
    shared, is_plain = traits_for(q).shared_bytes, windows.keys.dtype == q.dtype
    tile = _tile(kind, rows_of_tiles(tokens), heads, shared, is_plain=is_plain)
    # of rows of any length
    num_entries = 0 if pool is None else in_table * per_block
    max_tiles = -(-windows.size // tile["KEYS"]) + -(-num_entries // tile["KEYS"])
    splits = num_splits(tokens, heads, max_tiles)
    values, lse = partials if splits > 1 else (None, None)
    attend_v4_kernel[tokens, -(-heads // tile["HEADS"]), splits](
        q, windows.keys, windows.ring, pool, slots, sinks, cos_sin, *places,
        *kernel_arguments(out), values, lse, heads, in_table,
        0 if slots is None else slots.shape[1], epsilon, Q_STRIDE=q.strides[0],
        ROW=windows.keys.shape[1], WINDOW=windows.size, RING=windows.ring_rows, RATIO=ratio,
        PER_BLOCK=per_block, PADDED=padded, WIDE=wide, **tile, **form,
    )  # fmt: skip
    if splits > 1:
        max_splits, channels, warps = next(x for x in COMBINE_CONFIGS if x[0] >= splits)
        channels = min(channels, padded)
        combine_v4_kernel[tokens * heads, padded // channels](
            values, lse, sinks, cos_sin, places.positions, *kernel_arguments(out), heads, splits,
            MAX_SPLITS=max_splits, COLUMNS=channels, num_warps=warps, **form,
        )  # fmt: skip
