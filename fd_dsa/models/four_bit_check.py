"""Self-check of the GEMM of experts in four bits, before a device holds a model's experts so."""

from __future__ import annotations

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.errors import FdDsaError
from fd_dsa.models.four_bits import FourBits, in_pieces, integer_scales
from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.fp4 import E2M1_VALUES, E8M0_VALUES, FACTOR_POWER

_EXPERTS, _COLUMNS, _WIDTH = 2, 64, 256
# few rows and many rows have tiles of their own
_ROWS = 3, 140


def difference(form: FourBits, allocate: Allocate) -> str:
    """Return how the results of the kernel differ from float64, or "".

    Args:
        form: layout of the weights. Names do not matter.
        allocate: makes a tensor of a shape and dtype on the device.
    """
    try:
        for num_rows in _ROWS:
            found, wanted = _results(form, allocate, num_rows)
            error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            # also true for NaN
            if not error < 2.0**-6:
                return f"{num_rows} rows differ from the definition by {error:.2g} of the largest"
    except FdDsaError as error:
        return str(error)
    return ""


def _results(form: FourBits, allocate: Allocate, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the results of a gated GEMM on the device, and those in float64."""
    # kernels are loaded only if there is a device
    from fd_dsa.device.transfers import on_host, uploaded
    from fd_dsa.ops.expert_pairs import group_pairs
    from fd_dsa.ops.four_bit_gemm import four_bit_gemm
    from fd_dsa.tensor import FourBitWeight, Fp8Rows

    rng = np.random.default_rng(0)
    outer, shapes = (_EXPERTS, 2), form.shapes(_COLUMNS, _WIDTH)
    codes = rng.integers(0, 256, (*outer, _COLUMNS, _WIDTH // 2), np.uint8)
    pieces = [in_pieces(matrix, form.kind) for matrix in codes.reshape(-1, *codes.shape[2:])]
    stored, scales, zeros = _scales(form, rng, (*outer, *shapes[1]))
    factors = np.array([[1, 2], [4, 3]], np.float32) / 16
    weight = FourBitWeight(
        codes=uploaded(allocate, np.stack(pieces).reshape(*outer, *shapes[0])),
        scales=uploaded(allocate, stored),
        factors=None,
        group=form.group,
        kind=form.kind,
        width=_WIDTH,
        peaks=uploaded(allocate, stored.max(axis=(2, 4))) if form.has_peaks else None,
    )
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*outer, _COLUMNS, _WIDTH)
    if form.kind == "int4":
        exact = values - zeros
    else:
        raised = factors * np.float32(2.0**FACTOR_POWER)
        weight = weight._replace(factors=uploaded(allocate, raised))
        exact = E2M1_VALUES[values] * factors[:, :, None, None].astype(np.float64)
    exact = exact * scales
    x = rng.integers(-4, 5, (num_rows, _WIDTH)).astype(np.float32) / 64
    experts = np.arange(num_rows, dtype=np.int32)[:, None] % _EXPERTS
    lists = group_pairs(uploaded(allocate, experts), _EXPERTS)
    bits = uploaded(allocate, bfloat16_bits(x), "bfloat16")
    out = four_bit_gemm(bits, weight, *lists, top_k=1)
    assert not isinstance(out, Fp8Rows), "a second GEMM in FP8 has a width of n * 128"
    found = on_host(out, np.empty((num_rows, _COLUMNS), np.uint16)).astype(np.uint32) << 16
    sums = np.einsum("rk,rpck->prc", x.astype(np.float64), exact[experts[:, 0]])
    gate, up = sums
    return found.view(np.float32), gate / (1 + np.exp(-gate)) * up


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
        _columns(one).astype(np.float64).repeat(form.group, axis=3) for one in (values, zeros)
    )
    return stored, scales, points
