"""Residual streams of hyper-connections on a device, two launches between two blocks.

The first launch adds the output of a block to the streams and multiplies them by the weight of the
next connection. The sums of this GEMM are in parts, one for each program. The second launch adds
the parts, makes the gates, and norms the weighted sum that the next block reads. If FP8 weights
read it, the launch quantises it, too.

Streams have the type of the activations, everything between them is float32. The order of a token's
sums depends only on the sizes of the model.
"""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.ops.dense_kernels import (
    GROUP,
    empty_beside,
    empty_fp8_rows,
    kernel_arguments,
    sigmoid,
    store_groups,
)
from fd_dsa.ops.device_functions import stored, to_bfloat16, widened
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Normed, Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# tokens and channels of a program of the first launch
_TOKENS, _CHANNELS = 16, 64


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
    num_tokens,
    WIDTH: tl.constexpr,
    STREAMS: tl.constexpr,
    PADDED: tl.constexpr,
    MIXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute channels of block `program 1` for the tokens of tile `program 0`.

    Without `streams_ptr` every stream is the change. Without `change_ptr` the streams stay as they
    are. Without `mixture_ptr` the change is added to every stream. Without `fn_ptr` there are no
    sums; their last column has the squares. PADDED is STREAMS as a power of two.
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
    wait_for_inputs()
    start_next()
    # [streams, tokens, channels], so that a thread has all streams of its channels
    mask = is_stream[:, None, None] & live[None, :, None] & inside[None, None, :]
    row = token[None, :] * STREAMS + stream[:, None]
    place = row[:, :, None] * WIDTH + channel[None, None, :]
    if change_ptr is None:
        values = tl.load(streams_ptr + place, mask=mask, other=0.0)
    else:
        at = token[:, None] * WIDTH + channel[None, :]
        change = tl.load(change_ptr + at, mask=live[:, None] & inside[None, :], other=0.0)
        total = widened(change)[None, :, :] + tl.zeros([PADDED, TOKENS, BLOCK], tl.float32)
        if streams_ptr is not None:
            before = widened(tl.load(streams_ptr + place, mask=mask, other=0.0))
            if mixture_ptr is None:
                total += before
            else:
                factors = mixture_ptr + row * (STREAMS + 1)
                is_row = is_stream[:, None] & live[None, :]
                total *= tl.load(factors + STREAMS, mask=is_row, other=0.0)[:, :, None]
                # [streams after, streams before, tokens]
                at = factors[:, None, :] + stream[None, :, None]
                is_factor = is_row[:, None, :] & is_stream[None, :, None]
                mixture = tl.load(at, mask=is_factor, other=0.0)
                total += tl.sum(mixture[:, :, :, None] * before[None, :, :, :], axis=1)
        values = stored(tl.where(mask, total, 0.0), out_ptr)
        tl.store(out_ptr + place, values, mask=mask)
    if fn_ptr is not None:
        wide = widened(values)
        squares = tl.sum(tl.sum(wide * wide, axis=0), axis=1)
        flat = tl.reshape(tl.permute(values, (1, 0, 2)), [TOKENS, PADDED * BLOCK])
        if values.dtype == tl.bfloat16:
            # three bfloat16 numbers hold the 24 bits of a float32
            high = to_bfloat16(fn)
            rest = fn - widened(high)
            middle = to_bfloat16(rest)
            sums = tl.dot(flat, to_bfloat16(rest - widened(middle)))
            sums = tl.dot(flat, high, acc=tl.dot(flat, middle, acc=sums))
        else:
            sums = tl.dot(flat, fn, input_precision="ieee")
        sums = tl.where((column == MIXES)[None, :], squares[:, None], sums)
        part = tl.program_id(1).to(tl.int64) * num_tokens + token
        tl.store(sums_ptr + part[:, None] * COLUMNS + column[None, :], sums, mask=live[:, None])


@triton.jit
def _total(
    sums_ptr, token, num_tokens, column, exists, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
):  # fmt: skip
    """Add the parts of some columns of a token's sums."""
    part = tl.arange(0, PARTS_PADDED)
    at = (part.to(tl.int64)[:, None] * num_tokens + token) * COLUMNS + column[None, :]
    mask = (part < PARTS)[:, None] & exists[None, :]
    return tl.sum(tl.load(sums_ptr + at, mask=mask, other=0.0), axis=0)


@triton.jit
def _doubly_stochastic(logits, real, epsilon, ITERATIONS: tl.constexpr):
    """Normalise a matrix by a softmax of its rows, then Sinkhorn from the columns on."""
    logits = tl.where(real, logits, float("-inf"))
    top = tl.max(logits, axis=1)
    a = tl.where(real, tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[:, None]), 0.0)
    total = tl.sum(a, axis=1)
    a = tl.where(real, a / tl.where(total == 0.0, 1.0, total)[:, None] + epsilon, 0.0)
    a = a / (tl.sum(a, axis=0) + epsilon)[None, :]
    for _ in range(ITERATIONS - 1):
        a = a / (tl.sum(a, axis=1) + epsilon)[:, None]
        a = a / (tl.sum(a, axis=0) + epsilon)[None, :]
    return a


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
    MIXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
):
    """Read the input of a block for token `program 0`, and write the mixture unless it is None.

    `codes_ptr` and `scales_ptr` may be None together. PADDED, PARTS_PADDED and BLOCK are STREAMS,
    PARTS and WIDTH as powers of two.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    weight = tl.load(norm_ptr + channel, mask=inside, other=0.0)
    wait_for_inputs()
    start_next()
    stream = tl.arange(0, PADDED)
    is_stream = stream < STREAMS
    square = _total(
        sums_ptr, token, num_tokens, MIXES + tl.zeros([1], tl.int32), tl.full([1], 1, tl.int1),
        COLUMNS, PARTS, PARTS_PADDED,
    )  # fmt: skip
    inverse = 1.0 / tl.sqrt_rn(tl.sum(square, axis=0) / (STREAMS * WIDTH) + norm_epsilon)
    gate = _total(sums_ptr, token, num_tokens, stream, is_stream, COLUMNS, PARTS, PARTS_PADDED)
    gate = gate * inverse * tl.load(scale_ptr)
    gate = sigmoid(gate + tl.load(base_ptr + stream, mask=is_stream, other=0.0)) + epsilon
    if mixture_ptr is not None:
        row = mixture_ptr + token * (STREAMS * (STREAMS + 1))
        post = _total(
            sums_ptr, token, num_tokens, STREAMS + stream, is_stream, COLUMNS, PARTS, PARTS_PADDED
        )
        post = post * inverse * tl.load(scale_ptr + 1)
        post += tl.load(base_ptr + STREAMS + stream, mask=is_stream, other=0.0)
        tl.store(row + stream * (STREAMS + 1) + STREAMS, 2.0 * sigmoid(post), mask=is_stream)
        cell = tl.arange(0, PADDED * PADDED)
        source, target = cell // PADDED, cell % PADDED
        real = (source < STREAMS) & (target < STREAMS)
        at = 2 * STREAMS + source * STREAMS + target
        logits = _total(sums_ptr, token, num_tokens, at, real, COLUMNS, PARTS, PARTS_PADDED)
        logits = logits * inverse * tl.load(scale_ptr + 2)
        logits += tl.load(base_ptr + at, mask=real, other=0.0)
        logits = tl.reshape(logits, [PADDED, PADDED])
        real = is_stream[:, None] & is_stream[None, :]
        a = _doubly_stochastic(logits, real, epsilon, ITERATIONS)
        # transposed: a row has the factors of one stream after the block
        tl.store(row + stream[None, :] * (STREAMS + 1) + stream[:, None], a, mask=real)
    x = tl.zeros([BLOCK], tl.float32)
    for index in tl.static_range(STREAMS):
        place = (token * STREAMS + index) * WIDTH + channel
        one = widened(tl.load(streams_ptr + place, mask=inside, other=0.0))
        x += one * tl.sum(tl.where(stream == index, gate, 0.0), axis=0)
    x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / WIDTH + norm_epsilon)) * weight
    normed = stored(x, out_ptr)
    tl.store(out_ptr + token * WIDTH + channel, normed, mask=inside)
    if codes_ptr is not None:
        codes, scales = codes_ptr + token * WIDTH, scales_ptr + token
        store_groups(widened(normed), codes, scales, scale_stride, WIDTH, BLOCK, ROUND_SCALES)


def expand_streams(
    streams: Tensor | None,
    change: Tensor | None,
    mixture: Tensor | None,
    connection: Connection | None,
    num_streams: int,
) -> tuple[Tensor, Tensor]:
    """Add the output of a block to the streams, and project them for the next connection.

    Args:
        streams: float32 or bfloat16 [num_tokens, num_streams, width], contiguous. None = every
            stream is `change`, as before the first block.
        change: [num_tokens, width], output of the block; None = the streams stay as they are.
        mixture: result of `read_streams` before the block; None = the change is added to every
            stream.
        connection: the next connection; None = no projection.

    Returns:
        The streams, and the sums for `read_streams`.
    """
    like = change if streams is None else streams
    assert like is not None, "without streams there is a change"
    tokens, width = like.shape[0], like.shape[-1]
    block = min(_CHANNELS, max(16, next_power_of_2(width)))
    grid = -(-tokens // _TOKENS), -(-width // block)
    mixes, columns = 0, 16
    out = streams
    if change is not None:
        out = empty_beside(like, tokens, num_streams, width)
    assert out is not None
    sums, fn = out, None
    if connection is not None:
        mixes, fn = connection.base.shape[0], connection.fn
        columns = max(16, next_power_of_2(mixes + 1))
        sums = empty_beside(like, grid[1], tokens, columns, dtype="float32")
    if tokens:
        expand_streams_kernel[grid](
            streams, change, mixture, fn, out, sums, tokens, WIDTH=width, STREAMS=num_streams,
            PADDED=next_power_of_2(num_streams), MIXES=mixes, COLUMNS=columns, TOKENS=_TOKENS,
            BLOCK=block, num_warps=4,
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
    (tokens, count, width), rounds = streams.shape, connection.round_scales
    out, mixture = empty_beside(streams, tokens, width), None
    fp8 = None if rounds is None else empty_fp8_rows(streams, tokens, width)
    if connection.iterations:
        mixture = empty_beside(streams, tokens, count, count + 1, dtype="float32")
    block = max(GROUP, next_power_of_2(width))
    if tokens:
        _, *quantised = kernel_arguments(fp8)
        read_streams_kernel[(tokens,)](
            streams, sums, connection.base, connection.scale, connection.norm, mixture, out,
            *quantised, tokens, connection.norm_epsilon, connection.epsilon, WIDTH=width,
            STREAMS=count, MIXES=connection.base.shape[0], COLUMNS=sums.shape[2],
            PARTS=sums.shape[0], PARTS_PADDED=next_power_of_2(sums.shape[0]),
            ITERATIONS=connection.iterations, PADDED=next_power_of_2(count), BLOCK=block,
            ROUND_SCALES=bool(rounds), num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    return out if fp8 is None else Normed(out, fp8), mixture
