"""Types of the arrays that operators take: NumPy arrays, tensors, and FP8 activations.

The type checker does not read Paddle, so a tensor is described here by the members that the package
uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, Union

import numpy as np
import numpy.typing as npt

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]


class Place(Protocol):
    """Location of a tensor's memory, as Paddle describes it."""

    def __hash__(self) -> int: ...
    def is_cpu_place(self) -> bool: ...
    def is_gpu_place(self) -> bool: ...
    def is_custom_place(self) -> bool: ...
    def gpu_device_id(self) -> int: ...
    def custom_device_id(self) -> int: ...
    def custom_device_type(self) -> str: ...


class Tensor(Protocol):
    """Tensor of Paddle, or of another library given to `register_device_api`."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def strides(self) -> Sequence[int]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> object: ...
    @property
    def place(self) -> Place: ...
    def stride(self) -> Sequence[int]: ...
    def data_ptr(self) -> int: ...
    def element_size(self) -> int: ...
    def is_contiguous(self) -> bool: ...
    def numpy(self) -> np.ndarray: ...
    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def __getitem__(self, index: object) -> Tensor: ...
    def __setitem__(self, index: object, value: object) -> None: ...
    def __add__(self, other: object) -> Tensor: ...
    def __sub__(self, other: object) -> Tensor: ...
    def __mul__(self, other: object) -> Tensor: ...
    def __pow__(self, other: object) -> Tensor: ...
    def astype(self, dtype: str) -> Tensor: ...
    def clone(self) -> Tensor: ...
    def contiguous(self) -> Tensor: ...
    def detach(self) -> Tensor: ...
    def reshape(self, shape: Sequence[int]) -> Tensor: ...
    def transpose(self, axes: Sequence[int]) -> Tensor: ...
    def repeat_interleave(self, repeats: int, axis: int) -> Tensor: ...
    def new_empty(self, shape: Sequence[int]) -> Tensor: ...
    def new_zeros(self, shape: Sequence[int]) -> Tensor: ...
    def fill_(self, value: float) -> Tensor: ...
    def zero_(self) -> Tensor: ...


Array: TypeAlias = Union[np.ndarray, Tensor]  # noqa: UP007, the names are read when it is made
"""Array of either kind, for functions that accept both."""
StepArray: TypeAlias = Any
"""Array of a step, a NumPy array on a CPU and a Tensor on a device.

All arrays of a step are of the same kind, which a type checker cannot follow.
"""


class Fp8Rows(NamedTuple):
    """Rows of FP8 values: value c of row r is e4m3(codes[r, c]) * scales[c // 128, r].

    The scales are stored group by group, as cuBLASLt reads them (VEC128_32F). So a GEMM reads the
    scales of its rows for 128 values along K at once. Rows between the two GEMMs of MXFP4 experts
    may have groups of 64 (`expert_gemm_fp4_cuda.writes_fp8`).

    Attributes:
        codes: uint8 [rows, width], e4m3 bits, contiguous.
        scales: float32 [ceil(width / 128), n], contiguous. n is `dense_kernels.padded_rows(rows)`;
            columns from `rows` on are padding with any values.
        padded: uint8 [n, width]; `codes` and rows of padding with any values. None if `codes` has
            memory of its own.
    """

    codes: Any
    scales: Any
    padded: Any = None


class FourBitWeight(NamedTuple):
    """Matrices in four bits, one for each expert.

    A column of a GEMM is a row of the stored matrix. Value k of a column is e2m1(code) x scale x
    factor, or (code - zero) x scale. The gate and up matrices of an expert are stored one after the
    other.

    A column is stored in pieces of 128 values, the last one with codes of 0 up to its end. A piece
    has 16 words of 32 bits with 8 codes each. The kind gives the order.

    "int4": the lower 16 bits of words 2 * j and 2 * j + 1 have the codes of values 16 * n + 2 * j.
    The upper bits have the codes of the values one further on. From the low bits up, the first word
    has n = 0 to 3, and the second one n = 4 to 7. So one mask takes two neighbouring values.

    "e4m3": the values are those of "int4". The bits of the codes change places, because one shift
    then makes most codes a bfloat16. From the highest of 16 bits on, the first word has the
    sign of code 3 and two bits of code 0. Then come the sign of 2 and two bits of 4, the sign of 1,
    and three bits each of 3, 2 and 1. In the second word codes 7, 6 and 5 take the places of 3, 2
    and 1. The bits of codes 0 and 4 are their last two in the first word. In the second word they
    are the upper exponent bit and the sign.

    "e8m0": word 4 * t + s has codes of group s, and four neighbouring words have 8 codes of each
    group. Code 4 * h + i is that of value 32 * s + 16 * h + 4 * t + i, h = 0 or 1 and i = 0 to 3.
    Bits 4 * n to 4 * n + 2 are code n without its sign, because `prmt` then looks up four codes.
    The sign is bit 8 * i + 7 for h = 0 and bit 8 * i + 3 for h = 1. So one mask takes the signs of
    four codes.

    Attributes:
        codes: uint8 [experts, parts, pieces, columns, 64].
        scales: scales of e2m1 values, uint8 [experts, parts, pieces, columns, 128 / group]: e8m0
            codes, at least the column's peak - 26, or 8 * (exponent + 10) + mantissa of a positive
            e4m3 number. Scales of integers, int32 [experts, parts, groups, columns]: the bits of a
            float32 scale, whose last four are the zero point.
        factors: float32 [experts, parts] of e2m1 values, None for integers.
        group: values of a column with one scale.
        kind: "e4m3" or "e8m0" for e2m1 codes with such scales, "int4" for integers.
        width: values of a column.
        peaks: uint8 [experts, parts, columns], the largest e8m0 code of each column. None for
            other scales.
    """

    codes: Any
    scales: Any
    factors: Any
    group: int
    kind: str
    width: int
    peaks: Any = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, columns of all parts, values of a column."""
        experts, parts, _, columns, _ = self.codes.shape
        return experts, parts * columns, self.width


class Normed(NamedTuple):
    """Activations with a quantized form, for GEMMs of both kinds.

    Attributes:
        plain: float32 or bfloat16 [num_tokens, width].
        fp8: the same values in FP8.
    """

    plain: Tensor
    fp8: Fp8Rows

    @property
    def shape(self) -> Sequence[int]:
        return self.plain.shape
