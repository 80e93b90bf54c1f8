"""Self-check of the GEMM of experts in four bits, before a device holds a model's experts so."""

from __future__ import annotations

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.errors import FdDsaError
from fd_dsa.models.four_bits import FourBits
from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.fp4 import E2M1_VALUES, E8M0_VALUES, FACTOR_POWER
from fd_dsa.ops.fp8 import E4M3_VALUES

_EXPERTS, _COLUMNS, _WIDTH = 2, 48, 256
# few rows and many rows have kernels of their own
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
    from fd_dsa.ops.expert_kernels import group_pairs
    from fd_dsa.ops.four_bit_gemm import four_bit_gemm
    from fd_dsa.tensor import FourBitWeight

    rng = np.random.default_rng(0)
    outer, groups = (_EXPERTS, 2), (_WIDTH // form.group, _COLUMNS)
    pieces = _WIDTH // (2 * form.piece), _COLUMNS, form.piece
    codes = rng.integers(0, 256, (*outer, *pieces), np.uint8)
    zeros = rng.integers(0, 16, (*outer, *groups), np.uint8)
    scales = _scales(form, rng, (*outer, *groups))
    factors = np.array([[1, 2], [4, 3]], np.float32) / 16
    weight = FourBitWeight(
        codes=uploaded(allocate, codes),
        scales=uploaded(allocate, scales[0], form.scales),
        zeros=uploaded(allocate, zeros) if form.has_zeros else None,
        factors=None,
        group=form.group,
        kind=form.kind,
    )
    rows = codes.transpose(0, 1, 3, 2, 4).reshape(*outer, _COLUMNS, -1)
    values = np.stack([rows & 15, rows >> 4], axis=-1).reshape(*outer, _COLUMNS, _WIDTH)
    if form.kind == "int4":
        points = zeros if form.has_zeros else np.full_like(zeros, 8)
        exact = values - points.swapaxes(2, 3).repeat(form.group, axis=3).astype(np.float64)
    else:
        raised = factors * np.float32(2.0**FACTOR_POWER)
        weight = weight._replace(factors=uploaded(allocate, raised))
        exact = E2M1_VALUES[values] * factors[:, :, None, None].astype(np.float64)
    exact = exact * scales[1].swapaxes(2, 3).repeat(form.group, axis=3)
    x = rng.integers(-4, 5, (num_rows, _WIDTH)).astype(np.float32) / 64
    experts = np.arange(num_rows, dtype=np.int32)[:, None] % _EXPERTS
    lists = group_pairs(uploaded(allocate, experts), _EXPERTS)
    bits = uploaded(allocate, bfloat16_bits(x), "bfloat16")
    out = four_bit_gemm(bits, weight, *lists, top_k=1)
    found = on_host(out, np.empty((num_rows, _COLUMNS), np.uint16)).astype(np.uint32) << 16
    sums = np.einsum("rk,rpck->prc", x.astype(np.float64), exact[experts[:, 0]])
    gate, up = sums
    return found.view(np.float32), gate / (1 + np.exp(-gate)) * up


def _scales(
    form: FourBits, rng: np.random.Generator, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return scales as stored on a device, and their values."""
    if form.kind == "e4m3":
        codes = rng.integers(1, 0x48, shape, np.uint8)
        return codes, E4M3_VALUES[codes].astype(np.float64)
    if form.kind == "e8m0":
        codes = rng.integers(124, 130, shape, np.uint8)
        return codes, E8M0_VALUES[codes].astype(np.float64)
    # few bits, which every type holds
    values = rng.integers(1, 32, shape).astype(np.float32) / 256
    if form.scales == "bfloat16":
        return bfloat16_bits(values), values.astype(np.float64)
    return values.astype(form.scales), values.astype(np.float64)
