"""Layout of experts that a device holds in four bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from fd_dsa.errors import CheckpointError
from fd_dsa.models.sources import RandomTensor, SourceTensor
from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.fp4 import FACTOR_POWER, MAX_E8M0

_WIDTHS = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
PIECE = 32
"""Number of e2m1 values of a row that a kernel reads together."""
# deviation of random codes around their zero point, about
_E2M1_DEVIATION, _INT4_DEVIATION = 2.3, 4.6


@dataclass(frozen=True, slots=True)
class FourBits:
    """Experts in four bits on a device, see FourBitWeight.

    Attributes:
        names: names of the matrices.
        kind: as in FourBitWeight.
        group: values of a row with one scale on the device, 16 to 128.
        scales: dtype of the scales on the device.
        has_zeros: True if zero points are stored.
    """

    names: frozenset[str]
    kind: str
    group: int
    scales: str
    has_zeros: bool

    @property
    def piece(self) -> int:
        """Number of bytes of a row that are contiguous."""
        return self.group // 2 if self.kind == "int4" else PIECE // 2

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a matrix [out, in] on the device."""
        a_group = self.group // 2 + _WIDTHS[self.scales] + self.has_zeros
        return prod(shape) // self.group * a_group + 4 * (self.kind != "int4")

    def arrays(self, source: SourceTensor) -> list[np.ndarray | None]:
        """Return codes, scales, zero points and factor of a matrix in the order of the device.

        A random matrix has no codes.

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
        codes = codes[rows, start // 2 : stop // 2]
        if self.scales == "float32" and scales.dtype == np.uint16:
            scales = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
        elif self.scales == "float32":
            scales = scales.astype(np.float32)
        laid_out: list[np.ndarray | None] = [
            codes.reshape(len(codes), -1, self.piece).transpose(1, 0, 2),
            scales[rows, groups].T,
            None if zeros is None else zeros[rows, groups].T,
        ]
        return [*laid_out, self._factor(factor)]

    def _constants(self, source: RandomTensor) -> list[np.ndarray | None]:
        """Return the scales and the like of random codes."""
        rows, width = source.shape
        shape, deviation = (width // self.group, rows), source.deviation
        if self.kind == "int4":
            scales = np.full(shape, deviation / _INT4_DEVIATION, np.float32)
            if self.scales == "bfloat16":
                scales = bfloat16_bits(scales)
            elif self.scales == "float16":
                scales = scales.astype(np.float16)
            zeros = np.full(shape, 8, np.uint8) if self.has_zeros else None
            return [None, scales, zeros, None]
        one = 127 if self.kind == "e8m0" else 0x38
        factor = self._factor(deviation / _E2M1_DEVIATION)
        return [None, np.full(shape, one, np.uint8), None, factor]

    def _factor(self, factor: float) -> np.ndarray | None:
        """Return the factor of a matrix for the kernel, None for integers."""
        if self.kind == "int4":
            return None
        return np.array([factor * 2.0**FACTOR_POWER], np.float32)
