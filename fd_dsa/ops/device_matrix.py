"""Weights in device memory in float32, bfloat16 or block FP8, and their GEMMs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import paddle

from fd_dsa.errors import BackendUnavailable, DeviceError
from fd_dsa.ops.arrays import (
    allocator_beside,
    dtype_name,
    matmul,
    on_device,
    values_of,
)
from fd_dsa.ops.cublaslt import cublaslt_for
from fd_dsa.ops.cublaslt_library import fp8_unsupported_reason
from fd_dsa.ops.dense_kernels import (
    GROUP,
    empty,
    quantize_rows,
    rms_norm,
    silu_and_mul,
)
from fd_dsa.ops.expert_gemm import expert_gemm
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.four_bit_gemm import four_bit_gemm
from fd_dsa.ops.fp8_gemm import fp8_linear, fp8_linear_by_group
from fd_dsa.ops.head_gemm import head_gemm, join_columns, linear_in_one_order
from fd_dsa.ops.host_rows import Reducer
from fd_dsa.ops.side_by_side import MAX_GATED_ROWS, MAX_ROWS, side_by_side
from fd_dsa.tensor import FourBitWeight, Fp8Rows, Normed, Place, Tensor
from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.device_api import traits_for

logger = logging.getLogger(__name__)
OWN_ROWS = 32
"""Maximum number of rows for our own FP8 GEMM, which is then faster (`benchmarks.gpu_gemms`)."""
GROUPED_ROWS = 4096
"""Minimum number of rows for FP8 GEMMs of cuBLASLt by group.

With fewer rows the GEMM of a group leaves too many processors without a tile.
"""


@cache
def library_on(kind: type, place: Place) -> tuple[Any, bool]:
    """Return cuBLASLt on a device, None if it is missing, and True if it supports block FP8."""
    example = empty((1,), "float32", place)
    if not on_device(example) or INTERPRETING:
        return None, False
    try:
        library = cublaslt_for(example, allocator_beside(example))
    except (BackendUnavailable, DeviceError) as error:
        logger.warning("GEMMs with float32 results convert their operands: %s", error)
        return None, False
    against = fp8_unsupported_reason(traits_for(example).capability)
    many = f"our own kernel ({against})" if against else "cuBLASLt"
    logger.info("FP8 GEMMs of more than %d rows: %s", OWN_ROWS, many)
    return library, not against


def _fp8_by_cublaslt(rows: Fp8Rows, codes: Tensor, scales: Tensor) -> Tensor | None:
    """Multiply rows by an FP8 weight, or each group of their inputs by a weight of its own.

    Args:
        rows, codes, scales: as for `fp8_linear` or `fp8_linear_by_group`.

    Returns:
        bfloat16 [num_rows, out]. None if cuBLASLt may not be used, or would need a copy.
    """
    x, (outputs, width) = rows.padded, codes.shape
    if x is None or fixed_order() or outputs % 8 or width % (4 * GROUP):
        return None
    library, takes_fp8 = library_on(x.__class__, x.place)
    if not takes_fp8:
        return None
    num_rows, shape = rows.codes.shape[0], (x.shape[0], outputs)
    out = empty(shape, "bfloat16", x.place)
    library.fp8_linear(x, rows.scales, codes, scales, out)
    return out if num_rows == shape[0] else out[:num_rows]


class DeviceNorm:
    """RMSNorm of rows on a device. If FP8 weights read the result, it has both forms.

    Args:
        weight: float32 [width].
        epsilon: term added to the mean square.
        round_scales: as for DeviceMatrix; None if no FP8 weight reads the result.
    """

    def __init__(self, weight: Tensor, epsilon: float, round_scales: bool | None) -> None:
        self.weight, self.epsilon, self.round_scales = weight, epsilon, round_scales

    def normalize(self, x: Tensor) -> Tensor | Normed:
        """Normalize x [num_tokens, width], which may be columns of wider rows."""
        return rms_norm(x, None, self.weight, self.epsilon, self.round_scales)[1]

    def add_and_normalize(
        self, hidden_states: Tensor, change: Tensor, group: Reducer | None
    ) -> tuple[Tensor | None, Tensor | Normed]:
        """Add and normalize as HostNorm does, in one launch after the all-reduce."""
        if group is not None:
            change = group.all_reduce(change)
        return rms_norm(hidden_states, change, self.weight, self.epsilon, self.round_scales)


class DeviceMatrix:
    """Weight of a GEMM, of a GEMM for each head, or of a grouped GEMM of experts.

    Args:
        values: float32 or bfloat16, or e4m3 codes in uint8. Shape [out, in], for heads
            [heads, in, out], for experts [experts, out, in].
        scales: float32 [..., ceil(out / 128), ceil(in / 128)], factors of the blocks of codes.
        round_scales: True if scales of activations are rounded up to powers of two.
        sums_in_float32: True if results are float32 for every dtype of the weight.
        whole: weight of the heads of all ranks, which contains this one; None without one.
    """

    __slots__ = ("round_scales", "scales", "sums_in_float32", "values", "whole")

    def __init__(
        self,
        values: Tensor,
        scales: Tensor | None = None,
        *,
        round_scales: bool = False,
        sums_in_float32: bool = False,
        whole: DeviceMatrix | None = None,
    ) -> None:
        self.values, self.scales, self.round_scales = values, scales, round_scales
        self.whole = whole
        self.sums_in_float32 = sums_in_float32 and dtype_name(values.dtype) != "float32"

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the values."""
        return self.values.shape

    def first_rows(self, count: int) -> DeviceMatrix:
        """Return the weight of the first `count` outputs, whole blocks in FP8, in the same memory.

        The memory may be filled later.
        """
        rounds, wide = self.round_scales, self.sums_in_float32
        scales = None if self.scales is None else self.scales[: -(-count // GROUP)]
        own = self.values[:count]
        return DeviceMatrix(own, scales, round_scales=rounds, sums_in_float32=wide)

    def matmul(self, x: Tensor | Normed | Fp8Rows, out: Tensor | None = None) -> Tensor:
        """Multiply x [num_tokens, in], also as Normed or Fp8Rows, by the weight: [..., out].

        Args:
            out: float32 memory of the result, contiguous. None allocates.
        """
        rows = self._read(x)
        if self.sums_in_float32 and self.scales is None and not fixed_order():
            library, _ = library_on(rows.__class__, rows.place)
            if library is not None:
                if out is None:
                    out = empty((rows.shape[0], self.values.shape[0]), "float32", rows.place)
                library.linear(rows, self.values, out)
                return out
        found = self._multiplied(rows)
        return found if out is None else join_columns(found.reshape([1, *found.shape]), out)

    def _multiplied(self, rows: Any) -> Tensor:
        """Multiply as `matmul` does, without a GEMM of cuBLASLt that has float32 results."""
        if self.scales is not None:
            return self._matmul_fp8(rows, self.scales)
        if fixed_order():
            dtype = "float32" if self.sums_in_float32 else dtype_name(self.values.dtype)
            return linear_in_one_order(rows, self.values, dtype)
        if self.sums_in_float32:
            wide = paddle.cast(rows, "float32"), paddle.cast(self.values, "float32")
            return matmul(*wide, transpose_y=True)
        return matmul(rows, self.values, transpose_y=True)

    def _matmul_fp8(self, rows: Fp8Rows, scales: Tensor) -> Tensor:
        """Multiply by cuBLASLt if there are many rows and it supports them, else by our kernel."""
        found = None
        if rows.codes.shape[0] > OWN_ROWS:
            found = _fp8_by_cublaslt(rows, self.values, scales)
        return fp8_linear(rows, self.values, scales) if found is None else found

    def matmul_beside(
        self,
        x: Tensor | Normed,
        other: DeviceMatrix,
        reader: DeviceMatrix | None = None,
        limit: float | None = None,
    ) -> tuple[Any, Tensor]:
        """Multiply x by this weight and by another one, in one launch if that is supported.

        Args:
            other: weight with float32 results.
            reader: weight that reads the activation of gate and up, which this weight then has.
            limit: as for `activated`.

        Returns:
            The results of `matmul` by both weights. With `reader` the first is `reader.activated`.
        """
        (outputs, _), num_rows, scales = self.values.shape, x.shape[0], self.scales
        suits = scales is not None and other.scales is None and other.sums_in_float32
        suits = suits and 0 < num_rows <= MAX_ROWS and not fixed_order()
        if suits and scales is not None and isinstance(x, Normed):
            pair = self.values, scales
            is_gated = num_rows <= MAX_GATED_ROWS and outputs % (2 * GROUP) == 0
            if is_gated and reader is not None and reader.scales is not None:
                return side_by_side(x, pair, other.values, reader.round_scales, limit)
            found, others = side_by_side(x, pair, other.values)
        else:
            found, others = self.matmul(x), other.matmul(x)
        return found if reader is None else reader.activated(found, limit), others

    def matmul_by_head(self, x: Tensor) -> Tensor:
        """Multiply x [num_tokens, heads, in], maybe a view, by each head's weight: [..., out]."""
        return head_gemm(x, self.values)

    def matmul_join_heads(
        self, x: Tensor, reader: DeviceMatrix, out: Tensor | None = None, rows: Tensor | None = None
    ) -> Any:
        """Multiply as `matmul_by_head`, with the heads of a token side by side, for `reader`.

        Args:
            x: [num_tokens, heads, in], may be a view.
            reader: weight that multiplies the result. An FP8 weight gets FP8 if possible.
            out, rows: as for `head_gemm`.
        """
        rounds = self.scales_for(reader)
        out = head_gemm(x, self.values, rounds, out, rows)
        return out.reshape([out.shape[0], -1]) if rounds is None else out

    def scales_for(self, reader: DeviceMatrix) -> bool | None:
        """Return `round_scales` of a reader of `matmul_join_heads`, None if it reads no FP8."""
        is_fp8 = reader.scales is not None and self.values.shape[2] == GROUP
        return reader.round_scales if is_fp8 else None

    def grouped_matmul(
        self,
        x: Tensor | Normed | Fp8Rows,
        pairs: Tensor,
        counts: Tensor,
        *,
        top_k: int,
        gated: bool = False,
        limit: float | None = None,
    ) -> Tensor | Fp8Rows:
        """Multiply the row of each pair by its expert's weight, as `expert_gemm` does.

        A gated GEMM of FP8 weights returns Fp8Rows.
        """
        weight, rounds = (self.values, self.scales), self.round_scales
        how: dict[str, Any] = {"top_k": top_k, "gated": gated, "round_scales": rounds}
        how["limit"] = limit
        return expert_gemm(self._read(x), weight, pairs, counts, **how)

    def activated(self, gate_up: Tensor, limit: float | None = None) -> Tensor | Fp8Rows:
        """Return `silu_and_mul` of [num_tokens, 2 * in] in the form that `matmul` reads."""
        return silu_and_mul(gate_up, None if self.scales is None else self.round_scales, limit)

    def _read(self, x: Tensor | Normed | Fp8Rows) -> Any:
        """Return `x` in the form that GEMMs with the weight read."""
        if isinstance(x, Fp8Rows):
            return x
        if self.scales is None:
            return values_of(x)
        return x.fp8 if isinstance(x, Normed) else quantize_rows(x, self.round_scales)


class GroupedFp8:
    """FP8 weight that multiplies each group of inputs by a matrix of its own.

    Args:
        codes, scales: as for `fp8_linear_by_group`.
        round_scales: as for DeviceMatrix.
    """

    __slots__ = ("codes", "round_scales", "scales")

    def __init__(self, codes: Tensor, scales: Tensor, round_scales: bool) -> None:
        self.codes, self.scales, self.round_scales = codes, scales, round_scales

    def matmul_join_heads(self, x: Tensor | Fp8Rows, reader: DeviceMatrix) -> Any:
        """Multiply x as that of DeviceMatrix does.

        Args:
            x: [num_tokens, groups, in], contiguous, or Fp8Rows [num_tokens, groups * in].
        """
        if not isinstance(x, Fp8Rows):
            x = quantize_rows(x.reshape([x.shape[0], -1]), self.round_scales)
        rounds, found = None if reader.scales is None else reader.round_scales, None
        if x.codes.shape[0] >= GROUPED_ROWS:
            found = _fp8_by_cublaslt(x, self.codes, self.scales)
        if found is None:
            return fp8_linear_by_group(x, self.codes, self.scales, rounds)
        return found if rounds is None else quantize_rows(found, rounds)


class FourBitExperts:
    """Weight in four bits of a grouped GEMM of experts.

    Args:
        weight: two parts for gate and up, one for another weight.
    """

    __slots__ = ("weight",)

    def __init__(self, weight: FourBitWeight) -> None:
        self.weight = weight

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the values."""
        return self.weight.shape

    def grouped_matmul(
        self,
        x: Tensor | Normed | Fp8Rows,
        pairs: Tensor,
        counts: Tensor,
        *,
        top_k: int,
        gated: bool = False,
        limit: float | None = None,
    ) -> Tensor | Fp8Rows:
        """Multiply the row of each pair by its expert's weight, as `four_bit_gemm` does.

        Args:
            gated: True if and only if the weight has two parts.
        """
        return four_bit_gemm(x, self.weight, pairs, counts, top_k=top_k, limit=limit)
