"""Device functions that read the input of a block and its mixture from residual streams.

A small matrix is a tuple of scalars, row after row. Each thread has all of it, so that no sum goes
from thread to thread.

Source: Sinkhorn and Knopp, Concerning nonnegative matrices and doubly stochastic matrices.
"""

# Triton's tuples grow
# mypy: disable-error-code=assignment

from __future__ import annotations

from fd_dsa.ops.dense_kernels import sigmoid, store_norm
from fd_dsa.ops.device_functions import widened
from fd_dsa.triton_runtime import INTERPRETING

import triton  # isort: skip
import triton.language as tl  # isort: skip

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def _load_matrix(pointer, SIZE: tl.constexpr):
    """Load a matrix from memory that has it transposed, in rows of SIZE + 1 values."""
    matrix = ()
    for i in tl.static_range(SIZE):
        for j in tl.static_range(SIZE):
            matrix += (tl.load(pointer + j * (SIZE + 1) + i),)
    return matrix


@triton.jit
def _inverses(values, SIZE: tl.constexpr):
    """Return 1 / value of each value within a unit of the last place, by one instruction each."""
    result = ()
    for i in tl.static_range(SIZE):
        if _INTERPRETING:
            result += (1.0 / values[i],)
        else:
            result += (
                tl.inline_asm_elementwise(
                    "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values[i]], dtype=tl.float32,
                    is_pure=True, pack=1,
                ),
            )  # fmt: skip
    return result


@triton.jit
def _softmax(matrix, epsilon, SIZE: tl.constexpr):
    """Return the softmax of each row plus epsilon."""
    powers, totals = (), ()
    for i in tl.static_range(SIZE):
        top = matrix[i * SIZE]
        for j in tl.static_range(1, SIZE):
            top = tl.maximum(top, matrix[i * SIZE + j])
        total = tl.exp(matrix[i * SIZE] - top)
        powers += (total,)
        for j in tl.static_range(1, SIZE):
            power = tl.exp(matrix[i * SIZE + j] - top)
            powers += (power,)
            total += power
        totals += (total,)
    factors, result = _inverses(totals, SIZE), ()
    for i in tl.static_range(SIZE):
        for j in tl.static_range(SIZE):
            result += (tl.fma(powers[i * SIZE + j], factors[i], epsilon),)
    return result


@triton.jit
def _divisors(
    matrix, last, others, epsilon, SIZE: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr
):
    """Return the divisors of rows after they are normalised again.

    ROW and COLUMN are the distances of rows and columns. `others` are the divisors of the columns.
    With the last divisor d, the sum of a row is s / d. The row is divided by s / d + epsilon, so
    its new divisor is s + d * epsilon.
    """
    weights, result = _inverses(others, SIZE), ()
    for i in tl.static_range(SIZE):
        total = last[i] * epsilon
        for j in tl.static_range(SIZE):
            total = tl.fma(matrix[i * ROW + j * COLUMN], weights[j], total)
        result += (total,)
    return result


@triton.jit
def _store_doubly_stochastic(
    pointer, logits, epsilon, SIZE: tl.constexpr, ITERATIONS: tl.constexpr
):
    """Normalise a matrix by a softmax of its rows, then Sinkhorn from the columns on.

    The matrix itself stays, and a normalisation changes only the divisors of rows or columns. The
    result is stored in the order of `_load_matrix`.
    """
    matrix, rows = _softmax(logits, epsilon, SIZE), ()
    for _ in tl.static_range(SIZE):
        # the loop needs a number of the device, not a constant
        rows += (tl.full([], 1.0, tl.float32),)
    columns = _divisors(matrix, rows, rows, epsilon, SIZE, 1, SIZE)
    for _ in range(ITERATIONS - 1):
        rows = _divisors(matrix, rows, columns, epsilon, SIZE, SIZE, 1)
        columns = _divisors(matrix, columns, rows, epsilon, SIZE, 1, SIZE)
    by_row, by_column = _inverses(rows, SIZE), _inverses(columns, SIZE)
    for i in tl.static_range(SIZE):
        for j in tl.static_range(SIZE):
            value = matrix[i * SIZE + j] * by_row[i] * by_column[j]
            tl.store(pointer + j * (SIZE + 1) + i, value)


@triton.jit
def load_affine(
    scale_ptr, base_ptr, STREAMS: tl.constexpr, MIXES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Load the factor and the term of each column of a token's sums."""
    column = tl.arange(0, COLUMNS)
    kind = (column >= STREAMS).to(tl.int32) + (column >= 2 * STREAMS).to(tl.int32)
    scale = tl.load(scale_ptr + kind, mask=column < MIXES, other=0.0)
    return scale, tl.load(base_ptr + column, mask=column < MIXES, other=0.0)


@triton.jit
def read_token(
    streams_ptr, sums_ptr, scale, base, weight, mixture_ptr, out_ptr, codes_ptr, scales_ptr,
    scale_stride, token, num_tokens, norm_epsilon, epsilon, WIDTH: tl.constexpr,
    STREAMS: tl.constexpr, PADDED: tl.constexpr, MIXES: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr, ROUND_SCALES: tl.constexpr,
):  # fmt: skip
    """Read the input of a block for a token, and write the mixture unless its pointer is None."""
    channel, stream, column = tl.arange(0, BLOCK), tl.arange(0, PADDED), tl.arange(0, COLUMNS)
    inside, part = channel < WIDTH, tl.arange(0, PARTS_PADDED)
    # other programs may have stored both, and their stores do not reach the L1 cache
    at = (part.to(tl.int64) * num_tokens + token)[:, None] * COLUMNS + column[None, :]
    parts = tl.load(sums_ptr + at, mask=(part < PARTS)[:, None], other=0.0, cache_modifier=".cg")
    place = (token * STREAMS + stream)[:, None] * WIDTH + channel[None, :]
    mask = (stream < STREAMS)[:, None] & inside[None, :]
    values = tl.load(streams_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
    values = widened(values)
    square = tl.sum(tl.sum(values * values, axis=0), axis=0) / (STREAMS * WIDTH)
    mixes = tl.sum(parts, axis=0) * (1.0 / tl.sqrt_rn(square + norm_epsilon)) * scale + base
    gates = sigmoid(mixes)
    if mixture_ptr is not None:
        # a row has the factors of one stream after the block; first the logits are there
        rows = mixture_ptr + token * (STREAMS * (STREAMS + 1))
        cell = column - 2 * STREAMS
        at = (cell % STREAMS) * (STREAMS + 1) + cell // STREAMS
        at = tl.where(cell < 0, (column - STREAMS) * (STREAMS + 1) + STREAMS, at)
        found = tl.where(cell < 0, 2.0 * gates, mixes)
        tl.store(rows + at, found, mask=(column >= STREAMS) & (column < MIXES))
        tl.debug_barrier()
        logits = _load_matrix(rows, STREAMS)
    is_gate = column[None, :] == stream[:, None]
    gate = tl.sum(tl.where(is_gate, gates[None, :], 0.0), axis=1) + epsilon
    x = tl.sum(values * gate[:, None], axis=0)
    store_norm(
        x, weight, norm_epsilon, token, out_ptr, codes_ptr, scales_ptr, scale_stride, WIDTH, BLOCK,
        ROUND_SCALES,
    )  # fmt: skip
    if mixture_ptr is not None:
        # all threads must have loaded the logits
        tl.debug_barrier()
        _store_doubly_stochastic(rows, logits, epsilon, STREAMS, ITERATIONS)
