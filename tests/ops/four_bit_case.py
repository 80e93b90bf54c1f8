"""Weights of experts in four bits for kernel tests, and their exact values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.tensor import FourBitWeight
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8
from tests.v4_model.quantised import E2M1, E4M3


@dataclass(frozen=True)
class Form:
    """A layout that FourBitWeight describes."""

    kind: str
    group: int
    scales: str = "uint8"
    zeros: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.group} {self.scales}{' zeros' * self.zeros}"

    @property
    def piece(self) -> int:
        """Contiguous bytes of a column."""
        return self.group // 2 if self.kind == "int4" else 16


NVFP4, MXFP4 = Form("e4m3", 16), Form("e8m0", 32)
INT4 = Form("int4", 128, "float16", zeros=True)
FORMS = [
    *(NVFP4, MXFP4, INT4, Form("int4", 128, "bfloat16")),
    *(Form("int4", 64, "float32"), Form("int4", 32, "float16", zeros=True)),
    Form("int4", 16, "bfloat16", zeros=True),
]


class Weight:
    """Random matrices [experts, parts, columns, width].

    Attributes:
        codes, scales, zeros, factors: uint8 0 to 15 [experts, parts, columns, width], codes or
            values [experts, parts, columns, groups], zero points of that shape, factors
            [experts, parts].
    """

    def __init__(
        self, form: Form, experts: int, parts: int, columns: int, width: int, seed: int = 0
    ) -> None:
        rng = np.random.default_rng([seed, experts, parts, columns, width, form.group])
        self.form, outer = form, (experts, parts)
        shape = (*outer, columns, width // form.group)
        self.codes = rng.integers(0, 16, (*outer, columns, width), np.uint8)
        self.zeros = np.full(shape, 8, np.uint8)
        self.factors = np.ones(outer, np.float32)
        if form.kind == "int4":
            drawn = 2.0 ** rng.integers(-4, 3, shape) * rng.uniform(1, 2, shape) / width**0.5 / 8
            drawn = np.float32(drawn)
            if form.scales == "float16":
                drawn = drawn.astype(np.float16).astype(np.float32)
            elif form.scales == "bfloat16":
                drawn = block_fp8.rounded(drawn, "bfloat16")
            self.scales = drawn
        elif form.kind == "e4m3":
            # denormal numbers and the largest one, too
            self.scales = rng.choice(np.uint8([1, 7, 8, 0x20, 0x33, 0x38, 0x47, 0x7E]), shape)
            self.factors = np.float32(rng.uniform(1, 2, outer) / width**0.5 / 200)
        else:
            self.scales = rng.integers(112, 124, shape).astype(np.uint8)
        if form.zeros:
            self.zeros = rng.integers(0, 16, shape).astype(np.uint8)

    def values(self) -> np.ndarray:
        """float64 [experts, parts * columns, width]."""
        scales, size = self.scales, self.form.group
        if self.form.kind == "int4":
            values = self.codes - self.zeros.repeat(size, axis=3).astype(np.float64)
        else:
            values = E2M1[self.codes].astype(np.float64)
            powers = 2.0 ** (scales.astype(np.float64) - 127)
            scales = E4M3[scales] if self.form.kind == "e4m3" else powers
        values = values * scales.astype(np.float64).repeat(size, axis=3)
        values *= self.factors[:, :, None, None]
        return values.reshape(len(values), -1, values.shape[3])

    def put(self, m: KernelMemory) -> FourBitWeight:
        """The weight in a memory."""
        form, (experts, parts, columns) = self.form, self.codes.shape[:3]
        packed = self.codes[..., ::2] | self.codes[..., 1::2] << np.uint8(4)
        pieces = packed.reshape(experts, parts, columns, -1, form.piece).swapaxes(2, 3)
        scales: Any = self.scales.swapaxes(2, 3)
        is_int4 = form.kind == "int4"
        if form.scales == "bfloat16":
            scales = block_fp8.put(m, scales, "bfloat16")
        else:
            scales = m.put(scales, form.scales)
        return FourBitWeight(
            codes=m.put(pieces),
            scales=scales,
            zeros=m.put(self.zeros.swapaxes(2, 3)) if form.zeros else None,
            # what a matrix of e2m1 codes has in any case
            factors=None if is_int4 else m.put(self.factors * np.float32(2.0**26)),
            group=form.group,
            kind=form.kind,
        )


def values_on_device(m: KernelMemory, weight: FourBitWeight) -> np.ndarray:
    """float64 [experts, parts, columns, width] of a weight, element by element."""
    codes = m.get(weight.codes).astype(np.int64)
    pieces, columns, size = codes.shape[2:]
    k = np.arange(2 * pieces * size)
    column = np.arange(columns)[:, None]
    bits = codes[:, :, k // (2 * size), column, k % (2 * size) // 2] >> (4 * (k % 2)) & 15
    group = k // weight.group
    stored = block_fp8.get(m, weight.scales)[:, :, group, column]
    if weight.kind == "int4":
        zeros: Any = 8
        if weight.zeros is not None:
            zeros = m.get(weight.zeros)[:, :, group, column].astype(np.int64)
        return (bits - zeros) * stored.astype(np.float64)
    scales = E4M3[stored] if weight.kind == "e4m3" else 2.0 ** (stored.astype(np.float64) - 127)
    factors = m.get(weight.factors).astype(np.float64)[:, :, None, None] / 2.0**26
    return E2M1[bits].astype(np.float64) * scales.astype(np.float64) * factors
