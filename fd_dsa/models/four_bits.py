"""Layout of experts that a device holds in four bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from fd_dsa.errors import CheckpointError
from fd_dsa.models.sources import RandomTensor, SourceTensor
from fd_dsa.ops.fp4 import FACTOR_POWER, MAX_E8M0, PIECE
from fd_dsa.ops.fp8 import E4M3_VALUES

# deviation of random codes (`fill_codes`) around their zero point
_E2M1_DEVIATION, _INT4_DEVIATION = 2.926, 4.183
# An e5m2 number holds 2^13 times an e2m1 number, and 2^-13 times one. So a kernel in FP8 is exact
# for scales down to this exponent of 2 below the largest one of their row.
_EXACT_SPREAD = np.uint8(26)
_SIZES = np.uint64(0x7777777777777777)
_LOW_NIBBLES, _NIBBLE = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)


def _scale_table() -> np.ndarray:
    """Return the code on a device of each positive e4m3 code, uint8 [128]. Zero has none."""
    mantissa, exponent = np.frexp(np.nan_to_num(E4M3_VALUES[:128], nan=480))
    table = 8 * (exponent + 9) + np.rint(16 * mantissa).astype(np.int64) - 8
    table[0] = 0
    return table.astype(np.uint8)


_E4M3_SCALES = _scale_table()


def _e2m1_table() -> np.ndarray:
    """Return the bits of four e2m1 codes before `in_pieces` exchanges some, uint16 [65536].

    Where FourBitWeight has two bits of code 4, these are the others of code 0.
    """
    bits, table = np.arange(1 << 16), np.zeros(1 << 16, np.int64)
    for left, mask in (
        *((0, 0x8000), (-6, 0x01C0), (1, 0x1000), (-5, 0x0038)),
        *((2, 0x0200), (-4, 0x0007), (13, 0x6000), (9, 0x0800), (7, 0x0400)),
    ):
        table |= (bits << left if left > 0 else bits >> -left) & mask
    return table.astype(np.uint16)


_E2M1_HALVES = _e2m1_table()


def _mxfp4_tables() -> list[np.ndarray]:
    """Return the bits in a word of four e2m1 codes of kind "e8m0", uint32 [65536] for each h."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    tables = [bits & np.uint32(0x7777), (bits & np.uint32(0x7777)) << np.uint32(16)]
    for i in range(4):
        sign = bits >> np.uint32(4 * i + 3) & np.uint32(1)
        tables[0] |= sign << np.uint32(8 * i + 7)
        tables[1] |= sign << np.uint32(8 * i + 3)
    return tables


_MXFP4_HALVES = _mxfp4_tables()


def in_pieces(codes: np.ndarray, kind: str) -> np.ndarray:
    """Return bytes of two neighbours [rows, bytes] as pieces [pieces, rows, 64], see FourBitWeight.

    The first neighbour is in the low bits.
    """
    rows, width = codes.shape
    pieces = -(-width // (PIECE // 2))
    if width % (PIECE // 2):
        codes = np.pad(codes, ((0, 0), (0, pieces * (PIECE // 2) - width)))
    codes = np.ascontiguousarray(codes)
    if kind == "e8m0":
        # two bytes are the codes of one half of a word
        halves = codes.view(np.uint16).reshape(rows, pieces, 4, 2, 4)
        low, high = (np.take(_MXFP4_HALVES[h], halves[:, :, :, h]) for h in range(2))
        words = np.ascontiguousarray((low | high).transpose(1, 0, 3, 2))
        return words.view(np.uint8).reshape(pieces, rows, PIECE // 2)
    # eight bytes are the codes of one nibble of all words
    planes = codes.view(np.uint64).reshape(rows, pieces, 8)
    even, odd = planes[..., ::2], planes[..., 1::2]
    low = even & _LOW_NIBBLES | (odd & _LOW_NIBBLES) << _NIBBLE
    high = even >> _NIBBLE & _LOW_NIBBLES | odd & ~_LOW_NIBBLES
    words = np.empty((pieces, rows, 8, 2, 4), np.uint8)
    for i, half in enumerate((low, high)):
        words[:, :, :, i] = half.view(np.uint8).reshape(rows, pieces, 4, 8).transpose(1, 0, 3, 2)
    words = words.reshape(pieces, rows, PIECE // 2)
    # a piece at a time, which a cache holds
    for piece in words:
        halves = piece.view(np.uint16)
        if kind == "e4m3":
            np.take(_E2M1_HALVES, halves, out=halves, mode="clip")
        pairs = halves.view(np.uint64)
        # values 2 * j + 1 go to the upper halves
        _exchange(pairs, 16, 0xFFFF0000)
        if kind == "e4m3":
            # bits 10 and 11 of first words go to bits 13 and 14 of second ones
            _exchange(pairs, 35, 0x0C000C00)
    return words


def _exchange(words: np.ndarray, distance: int, mask: int) -> None:
    """Exchange the bits of a mask with those that are a distance above them."""
    upper = np.uint64(distance)
    changes = words >> upper
    changes ^= words
    changes &= np.uint64(mask)
    words ^= changes
    changes <<= upper
    words ^= changes


def integer_scales(scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """Return float32 scales and their zero points, 8 without any, as int32, see FourBitWeight."""
    # rounded, if a scale has more bits than float16 and bfloat16
    bits = scales.astype(np.float32).view(np.uint32) + np.uint32(8) & np.uint32(0xFFFFFFF0)
    return (bits | (np.uint32(8) if zeros is None else zeros)).view(np.int32)


@dataclass(frozen=True, slots=True)
class FourBits:
    """Experts in four bits on a device, see FourBitWeight.

    Attributes:
        names: names of the matrices.
        kind: as in FourBitWeight.
        group: values of a row with one scale on the device, 16 to 128.
    """

    names: frozenset[str]
    kind: str
    group: int

    @property
    def scale_dtype(self) -> str:
        """Dtype of the scales on the device."""
        return "int32" if self.kind == "int4" else "uint8"

    @property
    def has_peaks(self) -> bool:
        """True if a device holds the largest scale of each column."""
        return self.kind == "e8m0"

    def shapes(self, columns: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of codes and scales of a matrix [columns, width] on the device."""
        pieces = -(-width // PIECE)
        codes = pieces, columns, PIECE // 2
        if self.kind == "int4":
            return codes, (width // self.group, columns)
        return codes, (pieces, columns, PIECE // self.group)

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a matrix [out, in] on the device."""
        codes, scales = map(prod, self.shapes(*shape))
        if self.kind == "int4":
            return codes + 4 * scales
        return codes + scales + 4 + (shape[0] if self.has_peaks else 0)

    def arrays(self, source: SourceTensor) -> list[np.ndarray | None]:
        """Return codes, scales, factor and peaks of a matrix in the order of the device.

        None stands for those that the kind lacks, and for the codes of a random matrix.

        Raises:
            CheckpointError: a scale is no number or too large, or a zero point is out of range.
        """
        if isinstance(source, RandomTensor):
            return self._constants(source)
        codes, scales, zeros, factor = source.repack()
        if self.kind == "e8m0" and (highest := int(scales.max(initial=0))) > MAX_E8M0:
            raise CheckpointError(
                f"{source.info.file}: scales of {source.info.name!r}: got code {highest}, allowed "
                f"on a device: up to {MAX_E8M0} (2^{MAX_E8M0 - 127}); give --device cpu"
            )
        width = 2 * codes.shape[1]
        axis, start, stop = source.cut or (1, 0, width)
        stored_group = -(-width // scales.shape[1])
        if source.packing is not None and source.packing.group_size is not None:
            stored_group = source.packing.group_size
        if axis == 0:
            rows, start, stop = slice(start, stop), 0, width
        else:
            rows = slice(None)
        groups = np.arange(start, stop, self.group) // stored_group
        codes, scales = codes[rows, start // 2 : stop // 2], scales[rows, groups]
        if self.kind == "int4":
            if scales.dtype == np.uint16:
                scales = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
            points = None if zeros is None else zeros[rows, groups]
            return [in_pieces(codes, self.kind), integer_scales(scales, points).T, None, None]
        peaks = None
        if self.kind == "e4m3":
            codes, scales = _positive(codes, scales)
        else:
            peaks = scales.max(axis=1)
            if (peaks - scales.min(axis=1) > _EXACT_SPREAD).any():
                scales = np.where(_is_zero(codes, self.group), np.uint8(0), scales)
                peaks = scales.max(axis=1)
                lowest = peaks - np.minimum(peaks, _EXACT_SPREAD)
                scales = np.maximum(scales, lowest[:, None])
        return [in_pieces(codes, self.kind), self._scales(scales), self._factor(factor), peaks]

    def _scales(self, scales: np.ndarray) -> np.ndarray:
        """Return the scales of e2m1 values [rows, groups] in the order of the device."""
        (rows, groups), size = scales.shape, PIECE // self.group
        scales = np.pad(scales, ((0, 0), (0, -groups % size)))
        return scales.reshape(rows, -1, size).transpose(1, 0, 2)

    def _constants(self, source: RandomTensor) -> list[np.ndarray | None]:
        """Return what `arrays` returns of random codes."""
        shape, deviation = self.shapes(*source.shape)[1], source.deviation
        if self.kind == "int4":
            scales = np.full(shape, deviation / _INT4_DEVIATION, np.float32)
            return [None, integer_scales(scales, None), None, None]
        one = 127 if self.kind == "e8m0" else _E4M3_SCALES[0x38]
        factor = self._factor(deviation / _E2M1_DEVIATION)
        peaks = np.full(source.shape[0], one, np.uint8) if self.has_peaks else None
        return [None, np.full(shape, one, np.uint8), factor, peaks]

    def _factor(self, factor: float) -> np.ndarray:
        """Return the factor of a matrix of e2m1 values for the kernel."""
        return np.array([factor * 2.0 ** FACTOR_POWER[self.kind]], np.float32)


def _is_zero(codes: np.ndarray, group: int) -> np.ndarray:
    """Return True for each group of zeros of e2m1 codes [rows, bytes]."""
    words = np.ascontiguousarray(codes).view(np.uint64) & _SIZES
    words = words.reshape(len(codes), -1, group // 16)
    return np.bitwise_or.reduce(words, axis=2) == 0


def _positive(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return e2m1 codes [rows, bytes] and scales [rows, groups] for a device, from e4m3 scales.

    The signs of scales go to their codes, and codes with a scale of 0 become 0.
    """
    positive = scales & np.uint8(0x7F)
    if (scales - np.uint8(1) >= 0x7F).any():
        groups = np.ascontiguousarray(codes).view(np.uint64)
        signs = np.where(scales > 0x7F, np.uint64(0x8888888888888888), np.uint64(0))
        codes = np.where(positive > 0, groups ^ signs, np.uint64(0)).view(np.uint8)
    return codes, _E4M3_SCALES[positive]
