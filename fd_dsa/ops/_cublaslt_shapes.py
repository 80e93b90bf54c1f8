"""What cuBLASLt's GEMMs take: shapes, and the layouts of FP8 scales.

Source of the layouts: NVIDIA, cuBLAS documentation, "128-element 1D and 128x128 2D Block Scaling
for FP8 Data Types".
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fd_dsa.errors import ShapeError
from fd_dsa.ops._host import check_array, dtype_name, outer_strides

_GROUP, _MIN_ROWS, _ROW_MULTIPLE, _SCALE_MULTIPLE = 128, 8, 4, 4
_RESULTS = {
    "bfloat16": ("bfloat16", "float32"),
    "float32": ("float32",),
    "uint8": ("bfloat16",),
}


def padded_rows(num_tokens: int) -> int:
    """Rows of the arrays of `Cublaslt.fp8_linear` for some tokens: a multiple of 4, at least 8."""
    return max(_MIN_ROWS, -(-num_tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE)


class Gemm(NamedTuple):
    """What a plan is made for; steps are values from row to row of x, weight and out."""

    rows: int
    inputs: int
    outputs: int
    operands: str
    result: str
    steps: tuple[int, int, int]

    def __str__(self) -> str:
        kind = self.operands.replace("uint8", "block-scaled FP8")
        return f"{kind} [{self.rows}, {self.inputs}] x [{self.outputs}, {self.inputs}]^T to " + (
            f"{self.result}, rows {self.steps} apart"
        )


def checked(x: Any, weight: Any, out: Any, *scales: Any) -> Gemm:
    """The GEMM of these arguments, which are refused where they do not fit each other."""
    operator = "fp8_linear" if scales else "linear"
    allowed = ("uint8",) if scales else ("bfloat16", "float32")
    check_array(operator, "x", x, (None, None), allowed)
    kind, (rows, inputs) = dtype_name(x.dtype), x.shape
    check_array(operator, "weight", weight, (None, inputs), (kind,))
    outputs = weight.shape[0]
    check_array(operator, "out", out, (rows, outputs), _RESULTS[kind])
    if scales:
        _check_scales(rows, inputs, outputs, *scales)
    names = ("x", x), ("weight", weight), ("out", out)
    # the step of a single row may be anything
    x_step, weight_step, out_step = (
        outer_strides(operator, name, tensor)[0] if tensor.shape[0] > 1 else tensor.shape[1]
        for name, tensor in names
    )
    steps = x_step, weight_step, out_step
    return Gemm(rows, inputs, outputs, kind, dtype_name(out.dtype), steps)


def _check_scales(rows: int, inputs: int, outputs: int, scales_x: Any, scales_w: Any) -> None:
    """Refuse what cuBLASLt would read past the end of, or multiply by scales of other blocks."""
    if inputs % _GROUP or outputs % 8:
        raise ShapeError(
            f"fp8_linear: weight has shape {[outputs, inputs]}, allowed are a multiple of 8 and "
            f"one of {_GROUP}"
        )
    if rows != padded_rows(rows):
        raise ShapeError(
            f"fp8_linear: x has {rows} rows, allowed is a multiple of {_ROW_MULTIPLE} from "
            f"{_MIN_ROWS} on; give padded_rows(num_tokens) rows to x, its scales and out"
        )
    groups = inputs // _GROUP
    blocks = -(-outputs // _GROUP), -(-groups // _SCALE_MULTIPLE) * _SCALE_MULTIPLE
    for name, value, shape in (
        ("scales_x", scales_x, (groups, rows)),
        ("scales_w", scales_w, blocks),
    ):
        check_array("fp8_linear", name, value, shape, ("float32",))
        if not value.is_contiguous():
            raise ShapeError(f"fp8_linear: {name} of shape {list(shape)} is not contiguous")
