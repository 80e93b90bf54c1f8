"""Residual streams of hyper-connections on a device, one or two launches between two blocks.

The first launch adds the output of a block to the streams and multiplies them by the weight of the
next connection. The sums of this GEMM are in parts, one for each program. The second launch adds
the parts, makes the gates, and norms the weighted sum that the next block reads. If FP8 weights
read it, the launch quantises it, too. With a few tokens the last program of a token does the work
of the second launch. Both forms give the same bits, but batch-invariant mode has only the first.

Streams have the type of the activations, everything between them is float32. The order of a token's
sums depends on the sizes of the model, and on whether its step has more than LONG_PROMPT tokens. In
batch-invariant mode it depends only on the sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fd_dsa.ops.dense_kernels import GROUP, empty_beside, empty_norm
from fd_dsa.ops.device_functions import stored, to_bfloat16, widened
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.split_sums import is_last, scratch_beside
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.stream_functions import load_affine, read_token
from fd_dsa.tensor import Normed, Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton.language as tl  # isort: skip

# channels of a program of the first launch, and its tokens, then those of a long prompt
_CHANNELS, _TOKENS, _LONG_TOKENS = 64, 16, 64
LONG_PROMPT = 512
"""Number of tokens above which a program has more tokens.

Its part of `fn` then serves four times as many tokens. Steps of more tokens are padded to a larger
graph by default, so padding changes no bit.
"""
FEW_PROGRAMS = 264
"""Maximum number of programs with which one launch does the work of two.

It is two programs on each of the 132 processors of a Hopper GPU, as the registers allow. A token of
4096 channels has 64 programs, and they read the whole `fn` from the L2 cache, 1.5 MB for 4 streams.
Programs of further tokens would wait until others have ended, while tiles of 16 tokens read `fn`
once.
"""
# arguments from `base_ptr` to `scale_stride` of a first launch that has no work of the second
_NO_READING = (*[None] * 7, 0)


class Connection(NamedTuple):
    """Weights of a connection, float32, and its constants.

    Attributes:
        fn: [mixes * num_streams * width], the rows of the projection end to end. With S streams a
            block has (2 + S) * S mixes and the head S.
        base: [mixes].
        scale: [3], of the head [1].
        norm: [width], weight of the RMSNorm of the result.
        norm_epsilon: term added to mean squares, of the streams and of the result.
        epsilon: term added to gates and to the sums of the doubly stochastic matrix.
        iterations: normalisations of that matrix; 0 = the connection of the head.
        round_scales: as for DeviceNorm.
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor
    norm_epsilon: float
    epsilon: float
    iterations: int
    round_scales: bool | None = None


@step_kernel(waits=True)
def expand_streams_kernel(
    streams_ptr,
    change_ptr,
    mixture_ptr,
    fn_ptr,
    out_ptr,
    sums_ptr,
    counts_ptr,
    base_ptr,
    scale_ptr,
    norm_ptr,
    next_ptr,
    x_ptr,
    codes_ptr,
    scales_ptr,
    scale_stride,
    num_tokens,
    norm_epsilon,
    epsilon,
    WIDTH: tl.constexpr,
    STREAMS: tl.constexpr,
    PADDED: tl.constexpr,
    MIXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
):
    """Compute channels of block `program 1` for the tokens of tile `program 0`.

    Without `streams_ptr` every stream is the change. Without `change_ptr` the streams stay as they
    are. Without `mixture_ptr` the change is added to every stream. Without `fn_ptr` there are no
    sums. With `counts_ptr` a tile is one token, and its last program reads the streams, as
    `read_streams_kernel` does. PADDED is STREAMS as a power of two.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stream, column = tl.arange(0, PADDED), tl.arange(0, COLUMNS)
    live, inside, is_stream = token < num_tokens, channel < WIDTH, stream < STREAMS
    if fn_ptr is not None:
        # one GEMM over the channels of all streams; its weight is read ahead of the wait
        row = tl.reshape(stream[:, None] * WIDTH + channel[None, :], [PADDED * BLOCK])
        exists = (is_stream[:, None] & inside[None, :]).to(tl.int32)
        is_weight = tl.reshape(exists, [PADDED * BLOCK])[:, None] & (column < MIXES)[None, :]
        at = column[None, :] * (STREAMS * WIDTH) + row[:, None]
        fn = tl.load(fn_ptr + at, mask=is_weight != 0, other=0.0)
    if counts_ptr is not None:
        scale, base = load_affine(scale_ptr, base_ptr, STREAMS, MIXES, COLUMNS)
    wait_for_inputs()
    start_next()
    # [streams, tokens, channels], so that a thread has all streams of its channels
    mask = is_stream[:, None, None] & live[None, :, None] & inside[None, None, :]
    row = token[None, :] * STREAMS + stream[:, None]
    place = row[:, :, None] * WIDTH + channel[None, None, :]
    if change_ptr is None:
        values = tl.load(streams_ptr + place, mask=mask, other=0.0)
    else:
        is_value = live[None, :, None] & inside[None, None, :]
        at = token[None, :, None] * WIDTH + channel[None, None, :]
        total = widened(tl.load(change_ptr + at, mask=is_value, other=0.0))
        total += tl.zeros([PADDED, TOKENS, BLOCK], tl.float32)
        if streams_ptr is not None:
            if mixture_ptr is None:
                total += widened(tl.load(streams_ptr + place, mask=mask, other=0.0))
            else:
                factors = mixture_ptr + row * (STREAMS + 1)
                is_row = is_stream[:, None] & live[None, :]
                total *= tl.load(factors + STREAMS, mask=is_row, other=0.0)[:, :, None]
                # one order for every number of tokens in a tile
                for source in tl.static_range(STREAMS):
                    at = (token * STREAMS + source)[None, :, None] * WIDTH + channel[None, None, :]
                    before = widened(tl.load(streams_ptr + at, mask=is_value, other=0.0))
                    factor = tl.load(factors + source, mask=is_row, other=0.0)
                    total = tl.fma(factor[:, :, None], before, total)
        values = stored(tl.where(mask, total, 0.0), out_ptr)
        tl.store(out_ptr + place, values, mask=mask)
    if fn_ptr is not None:
        flat = tl.reshape(tl.permute(values, (1, 0, 2)), [TOKENS, PADDED * BLOCK])
        # a dot has 16 rows or more
        rows: tl.constexpr = TOKENS if TOKENS > 16 else 16
        index = tl.arange(0, rows)
        flat = tl.where((index < TOKENS)[:, None], flat, 0.0)
        if values.dtype == tl.bfloat16:
            # three bfloat16 numbers hold the 24 bits of a float32
            high = to_bfloat16(fn)
            rest = fn - widened(high)
            middle = to_bfloat16(rest)
            # the masks keep Triton from adding a dot to the last one, so that the three overlap
            is_mix = (column < MIXES)[None, :]
            sums = tl.where(is_mix, tl.dot(flat, to_bfloat16(rest - widened(middle))), 0.0)
            sums += tl.where(is_mix, tl.dot(flat, middle), 0.0)
            sums += tl.where(is_mix, tl.dot(flat, high), 0.0)
        else:
            sums = tl.dot(flat, fn, input_precision="ieee")
        token = tl.program_id(0).to(tl.int64) * TOKENS + index
        part = tl.program_id(1).to(tl.int64) * num_tokens + token
        live = (index < TOKENS) & (token < num_tokens)
        tl.store(sums_ptr + part[:, None] * COLUMNS + column[None, :], sums, mask=live[:, None])
    if counts_ptr is not None:
        token = tl.program_id(0).to(tl.int64)
        if is_last(counts_ptr + token, PARTS):
            every = tl.arange(0, PADDED_WIDTH)
            weight = tl.load(norm_ptr + every, mask=every < WIDTH, other=0.0)
            read_token(
                out_ptr, sums_ptr, scale, base, weight, next_ptr, x_ptr, codes_ptr, scales_ptr,
                scale_stride, token, num_tokens, norm_epsilon, epsilon, WIDTH, STREAMS, PADDED,
                MIXES, COLUMNS, PARTS, PARTS_PADDED, ITERATIONS, PADDED_WIDTH, ROUND_SCALES,
            )  # fmt: skip


@step_kernel(waits=True)
def read_streams_kernel(
    streams_ptr,
    sums_ptr,
    base_ptr,
    scale_ptr,
    norm_ptr,
    mixture_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scale_stride,
    num_tokens,
    norm_epsilon,
    epsilon,
    WIDTH: tl.constexpr,
    STREAMS: tl.constexpr,
    PADDED: tl.constexpr,
    MIXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
):
    """Read the input of a block for token `program 0`, and write the mixture unless it is None.

    `codes_ptr` and `scales_ptr` may be None together. PADDED, PARTS_PADDED and PADDED_WIDTH are
    STREAMS, PARTS and WIDTH as powers of two.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED_WIDTH)
    weight = tl.load(norm_ptr + channel, mask=channel < WIDTH, other=0.0)
    scale, base = load_affine(scale_ptr, base_ptr, STREAMS, MIXES, COLUMNS)
    wait_for_inputs()
    start_next()
    read_token(
        streams_ptr, sums_ptr, scale, base, weight, mixture_ptr, out_ptr, codes_ptr, scales_ptr,
        scale_stride, token, num_tokens, norm_epsilon, epsilon, WIDTH, STREAMS, PADDED, MIXES,
        COLUMNS, PARTS, PARTS_PADDED, ITERATIONS, PADDED_WIDTH, ROUND_SCALES,
    )  # fmt: skip


def between_blocks(
    streams: Tensor | None,
    change: Tensor,
    mixture: Tensor | None,
    connection: Connection,
    num_streams: int,
) -> tuple[Tensor, Tensor | Normed, Tensor | None]:
    """Add the output of a block to the streams, and read the input of the next block.

    Args:
        streams, mixture, num_streams: as for `expand_streams`.
        change: output of the block.
        connection: the next connection.

    Returns:
        The streams, and both results of `read_streams`.
    """
    like, counts = change if streams is None else streams, None
    tokens, width = change.shape
    parts = -(-width // _tile(tokens, width)[1])
    if 0 < tokens <= min(_TOKENS, FEW_PROGRAMS // parts) and not fixed_order():
        counts = scratch_beside(connection.base, "residual streams", 0)
    if counts is None:
        out, sums = expand_streams(streams, change, mixture, connection, num_streams)
        return out, *read_streams(out, sums, connection)
    results, reading = _results(like, num_streams, connection)
    added = streams, change, mixture, connection, num_streams
    return expand_streams(*added, counts, reading)[0], *results


def expand_streams(
    streams: Tensor | None,
    change: Tensor | None,
    mixture: Tensor | None,
    connection: Connection | None,
    num_streams: int,
    counts: Tensor | None = None,
    reading: tuple[Any, ...] = _NO_READING,
) -> tuple[Tensor, Tensor]:
    """Add the output of a block to the streams, and project them for the next connection.

    Args:
        streams: float32 or bfloat16 [num_tokens, num_streams, width], contiguous. None = every
            stream is `change`, as before the first block.
        change: [num_tokens, width], output of the block; None = the streams stay as they are.
        mixture: result of `read_streams` before the block; None = the change is added to every
            stream.
        connection: the next connection; None = no projection.
        counts: counters of finished programs. The launch then also does the work of `read_streams`.
        reading: arguments of the kernel for that work.

    Returns:
        The streams, and the sums for `read_streams`. Without a connection the second is not used.
    """
    like = change if streams is None else streams
    assert like is not None, "without streams there is a change"
    tokens, width = like.shape[0], like.shape[-1]
    tile, channels = _tile(tokens, width)
    sizes = _sizes(-(-width // channels), width, num_streams, connection)
    if counts is not None:
        tile = 1
    out = streams if change is None else empty_beside(like, tokens, num_streams, width)
    assert out is not None
    sums, fn, constants = out, None, (0.0, 0.0)
    if connection is not None:
        sums = empty_beside(like, sizes["PARTS"], tokens, sizes["COLUMNS"], dtype="float32")
        fn, constants = connection.fn, (connection.norm_epsilon, connection.epsilon)
    if tokens:
        expand_streams_kernel[(-(-tokens // tile), sizes["PARTS"])](
            streams, change, mixture, fn, out, sums, counts, *reading, tokens, *constants,
            TOKENS=tile, BLOCK=channels, num_warps=4 if counts is None else _warps(width),
            **sizes,
        )  # fmt: skip
    return out, sums


def read_streams(
    streams: Tensor, sums: Tensor, connection: Connection
) -> tuple[Tensor | Normed, Tensor | None]:
    """Return the normed input of a block, and the mixture that adds its output to the streams.

    Args:
        streams, sums: results of `expand_streams` with the same connection.

    Returns:
        [num_tokens, width], with `round_scales` also in FP8; and float32 [num_tokens, num_streams,
        num_streams + 1], None for the head. A row has the factors of a stream: of all streams
        before, and of the block's output.
    """
    tokens, count, width = streams.shape
    results, reading = _results(streams, count, connection)
    if tokens:
        read_streams_kernel[(tokens,)](
            streams, sums, *reading, tokens, connection.norm_epsilon, connection.epsilon,
            num_warps=_warps(width), **_sizes(sums.shape[0], width, count, connection),
        )  # fmt: skip
    return results


def _results(
    like: Tensor, count: int, connection: Connection
) -> tuple[tuple[Tensor | Normed, Tensor | None], tuple[Any, ...]]:
    """Allocate the results of `read_streams`, and return them and arguments of its kernel."""
    normed, of_norm = empty_norm(like, like.shape[-1], connection.round_scales)
    mixture = None
    if connection.iterations:
        mixture = empty_beside(like, like.shape[0], count, count + 1, dtype="float32")
    weights = connection.base, connection.scale, connection.norm
    return (normed, mixture), (*weights, mixture, *of_norm)


def _tile(tokens: int, width: int) -> tuple[int, int]:
    """Return the tokens and channels of a program if the first launch has no work of the second."""
    is_long = tokens > LONG_PROMPT and not fixed_order()
    channels = min(_CHANNELS, max(16, next_power_of_2(width)))
    return _LONG_TOKENS if is_long else _TOKENS, channels


def _warps(width: int) -> int:
    """Return the warps of a program that reads all channels of a token."""
    return 4 if width <= 4096 else 8


def _sizes(parts: int, width: int, count: int, connection: Connection | None) -> dict[str, int]:
    """Return the constants of both kernels. A token's sums have `parts` parts."""
    mixes, rounds, iterations = 0, None, 0
    if connection is not None:
        mixes, rounds = connection.base.shape[0], connection.round_scales
        iterations = connection.iterations
    return {
        "WIDTH": width,
        "STREAMS": count,
        "PADDED": next_power_of_2(count),
        "MIXES": mixes,
        "COLUMNS": max(16, next_power_of_2(mixes)),
        "PARTS": parts,
        "PARTS_PADDED": next_power_of_2(parts),
        "ITERATIONS": iterations,
        "PADDED_WIDTH": max(GROUP, next_power_of_2(width)),
        "ROUND_SCALES": bool(rounds),
    }
