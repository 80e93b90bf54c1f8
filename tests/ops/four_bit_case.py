"""Weights of experts in four bits for kernel tests, and their exact values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fd_dsa.tensor import FourBitWeight
from tests.kernel_memory import KernelMemory
from tests.v4_model.quantised import E2M1, E4M3


@dataclass(frozen=True)
class Form:
    """A layout that FourBitWeight describes. Zero points other than 8 are for integers."""

    kind: str
    group: int
    zeros: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.group}{' zeros' * self.zeros}"


POWERS = {"e4m3": 19, "e8m0": 26}
"""Exponent of 2 by which factors are raised."""
E2M1_BITS = (
    [(0, 13), (0, 14), (1, 14), (1, 13)],
    *([(0, at), (0, at + 1), (0, at + 2), (0, at + 9)] for at in (0, 3, 6)),
    [(0, 10), (0, 11), (1, 11), (1, 10)],
    *([(1, at), (1, at + 1), (1, at + 2), (1, at + 9)] for at in (0, 3, 6)),
)
"""Word of a pair and place of each bit of eight codes, from the lowest bit of a code."""


def place(kind: str, k: int) -> list[tuple[int, int]]:
    """The word of a piece and the place in it for each bit of value k, from the lowest one."""
    if kind == "e8m0":
        group, half, thread, i = k // 32, k % 32 // 16, k % 16 // 4, k % 4
        word, places = 4 * thread + group, [4 * (4 * half + i) + bit for bit in range(3)]
        return [(word, to) for to in (*places, 8 * i + (7, 3)[half])]
    code, pair, upper = k // 16, k % 16 // 2, 16 * (k % 2)
    if kind == "int4":
        bits = [(code // 4, 4 * (code % 4) + bit) for bit in range(4)]
    else:
        bits = E2M1_BITS[code]
    return [(2 * pair + word, upper + to) for word, to in bits]


NVFP4, MXFP4 = Form("e4m3", 16), Form("e8m0", 32)
INT4 = Form("int4", 128, zeros=True)
FORMS = [
    *(NVFP4, MXFP4, INT4, Form("int4", 128), Form("int4", 64), Form("int4", 32, zeros=True)),
    Form("int4", 16, zeros=True),
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
            # a device's scales keep 20 bits, so all of these
            self.scales = drawn.astype(np.float16).astype(np.float32)
        elif form.kind == "e4m3":
            # denormal numbers and the largest one, too
            self.scales = rng.choice(np.uint8([1, 7, 8, 0x20, 0x33, 0x38, 0x47, 0x7E]), shape)
            self.factors = np.float32(rng.uniform(1, 2, outer) / width**0.5 / 200)
        else:
            self.scales = rng.integers(112, 124, shape).astype(np.uint8)
        if form.zeros:
            self.zeros = rng.integers(0, 16, shape).astype(np.uint8)

    def values(self, experts: slice | np.ndarray = slice(None)) -> np.ndarray:
        """float64 [experts, parts * columns, width] of some experts."""
        codes, scales, size = self.codes[experts], self.scales[experts], self.form.group
        if self.form.kind == "int4":
            values = codes - self.zeros[experts].repeat(size, axis=3).astype(np.float64)
        else:
            values = E2M1[codes].astype(np.float64)
            powers = 2.0 ** (scales.astype(np.float64) - 127)
            scales = E4M3[scales] if self.form.kind == "e4m3" else powers
        values = values * scales.astype(np.float64).repeat(size, axis=3)
        values *= self.factors[experts][:, :, None, None]
        return values.reshape(len(values), -1, values.shape[3])

    def put(self, m: KernelMemory) -> FourBitWeight:
        """The weight in a memory."""
        form, (*outer, columns, width) = self.form, self.codes.shape
        pieces = -(-width // 128)
        codes = np.zeros((*outer, columns, 128 * pieces), np.uint8)
        codes[..., :width] = self.codes
        # [values, ..., pieces, columns], and words by their place, too
        codes = codes.reshape(*outer, columns, pieces, 128).transpose(4, 0, 1, 3, 2).copy()
        words = np.zeros((16, *outer, pieces, columns), np.uint32)
        is_int4 = form.kind == "int4"
        for k in range(128):
            bits = np.zeros((16, 16), np.uint32)
            for bit, (word, to) in enumerate(place(form.kind, k)):
                bits[word] |= (np.arange(16, dtype=np.uint32) >> bit & 1) << np.uint32(to)
            for word in np.flatnonzero(bits.any(axis=1)):
                words[word] |= bits[word][codes[k]]
        words = np.moveaxis(words, 0, -1).copy()
        if is_int4:
            bits = self.scales.view(np.uint32) & ~np.uint32(15) | self.zeros
            scales = bits.swapaxes(2, 3).view(np.int32)
        else:
            stored = self.scales
            if form.kind == "e4m3":
                mantissa, exponent = np.frexp(E4M3[stored].astype(np.float64))
                stored = (8 * (exponent + 9) + 16 * mantissa - 8).astype(np.uint8)
            size = 128 // form.group
            scales = np.zeros((*outer, columns, pieces * size), np.uint8)
            scales[..., : stored.shape[3]] = stored
            scales = scales.reshape(*outer, columns, pieces, size).swapaxes(2, 3)
        return FourBitWeight(
            codes=m.put(words.view(np.uint8)),
            scales=m.put(np.ascontiguousarray(scales)),
            # what a matrix of e2m1 codes has in any case
            factors=None if is_int4 else m.put(self.factors * np.float32(2.0 ** POWERS[form.kind])),
            group=form.group,
            kind=form.kind,
            width=width,
            peaks=m.put(scales.max(axis=(2, 4))) if form.kind == "e8m0" else None,
        )


def values_on_device(m: KernelMemory, weight: FourBitWeight) -> np.ndarray:
    """float64 [experts, parts, columns, width] of a weight, element by element."""
    words = m.get(weight.codes).view(np.uint32)
    k, column = np.arange(weight.width), np.arange(words.shape[3])[:, None]
    # [values, bits, 2]
    places = np.array([place(weight.kind, int(i)) for i in k % 128])
    bits = np.zeros((*words.shape[:2], len(column), len(k)), np.int64)
    for bit in range(4):
        word, to = places[:, bit].T
        found = words[:, :, k // 128, column, word].astype(np.int64)
        bits |= (found >> to & 1) << bit
    stored, group = m.get(weight.scales), k // weight.group
    if weight.kind == "int4":
        scales = stored.view(np.uint32)[:, :, group, column]
        numbers = (scales & ~np.uint32(15)).view(np.float32)
        return (bits - (scales & np.uint32(15))) * numbers.astype(np.float64)
    size = 128 // weight.group
    codes = stored[:, :, group // size, column, group % size].astype(np.float64)
    scales = 2.0 ** (codes - 127)
    if weight.kind == "e4m3":
        scales = (1 + codes % 8 / 8) * 2.0 ** (codes // 8 - 10)
    factors = (
        m.get(weight.factors).astype(np.float64)[:, :, None, None] / 2.0 ** POWERS[weight.kind]
    )
    return E2M1[bits].astype(np.float64) * scales * factors
