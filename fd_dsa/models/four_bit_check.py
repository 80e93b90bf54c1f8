"""Self-check of the GEMM of experts in four bits, before a device holds a model's experts so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.errors import FdDsaError
from fd_dsa.models.four_bits import FourBits, in_pieces, integer_scales
from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.fp4 import E2M1_VALUES, E8M0_VALUES, FACTOR_POWER
from fd_dsa.ops.fp8 import E4M3_VALUES
from fd_dsa.tensor import FourBitWeight, Fp8Rows, Tensor

# columns of each part, and their values
_WIDTH = 256
# Pairs of each expert. The kernels of custom_ops/ have tiles for each number, and that for MXFP4 a
# form for each mean number, as Triton's kernel. Its result for few pairs is in FP8, which needs 128
# columns.
_COUNTS = (
    (2, 1),
    (12, 9),
    (20, 14),
    (10, 30, 45),
    (30, 60, 75, 90, 120, 150, 180, 210, 240),
)


def difference(form: FourBits, allocate: Allocate) -> str:
    """Return how the results of the kernels differ from the definition, or "".

    Args:
        form: layout of the weights. Names do not matter.
        allocate: makes a tensor of a shape and dtype on the device.
    """
    try:
        for counts in _COUNTS:
            for name, error, bound in _errors(form, allocate, counts):
                # also true for NaN
                if not error < bound:
                    rows = f"{name} of {sum(counts)} rows"
                    return f"{rows} differs from the definition by {error:.2g} of the largest"
    except FdDsaError as error:
        return str(error)
    return ""


def _errors(
    form: FourBits, allocate: Allocate, counts: tuple[int, ...]
) -> Iterator[tuple[str, float, float]]:
    """Yield the name of each GEMM, its largest error, and the allowed one.

    Errors are shares of the largest result. The second GEMM reads the result of the first one if
    that is in FP8.
    """
    # kernels are loaded only if there is a device
    from fd_dsa.device.transfers import uploaded
    from fd_dsa.ops.expert_pairs import group_pairs
    from fd_dsa.ops.four_bit_gemm import four_bit_gemm

    rng = np.random.default_rng(0)
    experts = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    lists = group_pairs(uploaded(allocate, experts[:, None]), len(counts))
    x = rng.integers(-4, 5, (len(experts), _WIDTH)).astype(np.float32) / 64
    rows: Tensor | Fp8Rows = uploaded(allocate, bfloat16_bits(x), "bfloat16")
    for name, parts in ("gate_up", 2), ("down", 1):
        weight, exact = _weight(form, allocate, rng, (len(counts), parts))
        out = four_bit_gemm(rows, weight, *lists, top_k=1)
        found = _on_host(out, x.shape)
        products = [x[experts == i] @ exact[i] for i in range(len(counts))]
        # a gate may be too large for exp in float32
        sums = np.concatenate(products, axis=1, dtype=np.float64)
        wanted = sums[0] / (1 + np.exp(-sums[0])) * sums[1] if parts == 2 else sums[0]
        error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        # e4m3 has three bits after the first one
        yield name, error, 2.0**-4 if isinstance(out, Fp8Rows) else 2.0**-6
        if isinstance(out, Fp8Rows):
            rows, x = out, found


def _weight(
    form: FourBits, allocate: Allocate, rng: np.random.Generator, outer: tuple[int, int]
) -> tuple[FourBitWeight, np.ndarray]:
    """Return a random weight of (experts, parts), and values [experts, parts, width, columns]."""
    from fd_dsa.device.transfers import uploaded

    shapes = form.shapes(_WIDTH, _WIDTH)
    codes = rng.integers(0, 256, (*outer, _WIDTH, _WIDTH // 2), np.uint8)
    pieces = [in_pieces(matrix, form.kind) for matrix in codes.reshape(-1, *codes.shape[2:])]
    stored, scales, zeros = _scales(form, rng, (*outer, *shapes[1]))
    weight = FourBitWeight(
        codes=uploaded(allocate, np.stack(pieces).reshape(*outer, *shapes[0])),
        scales=uploaded(allocate, stored),
        factors=None,
        group=form.group,
        kind=form.kind,
        width=_WIDTH,
        peaks=uploaded(allocate, stored.max(axis=(2, 4))) if form.has_peaks else None,
    )
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*outer, _WIDTH, _WIDTH)
    if form.kind == "int4":
        exact = values - zeros
    else:
        factors = rng.integers(1, 5, outer).astype(np.float32) / 16
        raised = factors * np.float32(2.0 ** FACTOR_POWER[form.kind])
        weight = weight._replace(factors=uploaded(allocate, raised))
        exact = E2M1_VALUES[values] * factors[:, :, None, None]
    # exact in float32, because codes, scales and factors have few bits
    return weight, (exact * scales).swapaxes(2, 3)


def _on_host(out: Tensor | Fp8Rows, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of results of a shape."""
    from fd_dsa.device.transfers import on_host

    if not isinstance(out, Fp8Rows):
        bits = on_host(out, np.empty(shape, np.uint16))
        return (bits.astype(np.uint32) << 16).view(np.float32)
    scales = on_host(out.scales, np.empty(out.scales.shape, np.float32))[:, : shape[0]].T
    values = E4M3_VALUES[on_host(out.codes, np.empty(shape, np.uint8))]
    return values * scales.repeat(shape[1] // scales.shape[1], axis=1)


def _columns(pieces: np.ndarray) -> np.ndarray:
    """Return [experts, parts, columns, values] of [experts, parts, pieces, columns, values]."""
    return pieces.swapaxes(2, 3).reshape(*pieces.shape[:2], pieces.shape[3], -1)


def _scales(
    form: FourBits, rng: np.random.Generator, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scales as stored on a device, and scale and zero point of each value."""
    if form.kind == "int4":
        drawn = rng.integers(1, 32, shape).astype(np.float32) / 256
        points = rng.integers(0, 16, shape, np.uint32)
        stored = integer_scales(drawn, points)
        values, zeros = drawn[..., None], points[..., None]
    elif form.kind == "e4m3":
        stored = rng.integers(8, 152, shape, np.uint8)
        values = (1 + stored % 8 / 8) * 2.0 ** (stored // 8 - 10.0)
        zeros = np.zeros_like(stored)
    else:
        stored = rng.integers(124, 130, shape, np.uint8)
        values, zeros = E8M0_VALUES[stored], np.zeros_like(stored)
    scales, points = (
        _columns(one).astype(np.float32).repeat(form.group, axis=3) for one in (values, zeros)
    )
    return stored, scales, points
