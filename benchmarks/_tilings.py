"""Tilings that benchmarks time alongside the selected ones. Tests hold them to one result."""

from __future__ import annotations

from fd_dsa.ops.dense_kernels import GROUP
from fd_dsa.ops.split_sums import Tiling

_FEW = {
    rows: tuple(
        Tiling(rows, columns, warps, stages, 132 * per_processor)
        for columns, warps in ((64, 4), (128, 4), (128, 8))
        for per_processor, stages in (
            (1, 8),
            (1, 4),
            (2, 6),
            (2, 4),
            (2, 3),
            (3, 4),
            (3, 3),
            (4, 3),
        )
        # limits of a processor: 227 KiB, and 255 registers a thread
        if per_processor * stages * (columns + rows) * GROUP <= 227 << 10
        and rows * columns <= 2048 * warps
    )
    for rows in (16, 32, 64, 128)
}
# of a few rows, with several groups in a stage
_STAGES = {
    rows: tuple(
        Tiling(rows, columns, 4, stages, groups=groups)
        for columns in (16, 32)
        for groups in (2, 4, 8, 16)
        for stages in (1, 2, 3, 4)
        # limit of a processor: 227 KiB
        if stages * (columns + rows) * groups * GROUP <= 227 << 10
    )
    for rows in (8, 16)
}
_MANY = tuple(
    Tiling(rows, columns, warps, stages, 132)
    for rows, columns, warps in ((128, 128, 8), (64, 128, 4), (128, 64, 4))
    for stages in (3, 4, 5)
)
FP8_GEMMS = (*(tiling for few in _FEW.values() for tiling in few), *_MANY)
# by type of the operands
_EXPERTS = {
    kind: tuple(
        Tiling(rows, columns, warps, stages)
        for rows in (16, 32, 64, 128)
        for columns, warps in ((64, 4), (128, 4), (128, 8), (128, 16))
        for stages in (3, 4, 5, 6, 8)
        # limits: a thread's sums of a tile, and a gated tile's shared memory
        if warps < 16 or rows == 128
        if rows * columns <= 2048 * warps and stages * (2 * columns + rows) * 128 <= 227 << 10
    )
    for kind in ("uint8", "bfloat16")
} | {"float32": tuple(Tiling(rows, 64, 4, 3) for rows in (16, 32))}


def fp8_gemms(rows: int) -> tuple[Tiling, ...]:
    """Return the tilings that may be the fastest for a number of rows."""
    few = next((few for most, few in _FEW.items() if rows <= most), _MANY)
    return next((stages for most, stages in _STAGES.items() if rows <= most), ()) + few


def experts(kind: str, gated: bool) -> tuple[Tiling, ...]:
    """Return the tilings of a GEMM of experts. A gated one of FP8 scales its own 128 columns."""
    if kind == "four bits":
        # columns of both parts; a thread has the sums of at most 64 values
        return tuple(
            Tiling(rows, columns >> gated, warps, stages, maxnreg=maxnreg)
            for rows in (8, 16, 32, 64, 128)
            for columns, warps in ((64, 4), (128, 4), (128, 8))
            for stages in ((2, 3, 4, 5, 6) if rows <= 16 else (2, 3, 4))
            for maxnreg in ((None, 128) if rows == 128 and stages < 4 else (None,))
            if rows * columns <= 2048 * warps and (rows <= 32 or warps == columns // 16)
        )
    whole = gated and kind == "uint8"
    return tuple(t for t in _EXPERTS[kind] if t.columns == GROUP or not whole)
