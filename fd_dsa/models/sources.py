"""Sources of weights: tensors of a checkpoint, or random numbers in their place."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np

from fd_dsa.models.dequantize import (
    FLOAT_DTYPES,
    FP4,
    TensorInfo,
    dequantize_blocks,
    dequantize_groups,
    to_float32,
    wide_blocks,
)
from fd_dsa.models.packing import PackedMatrix, Packing, finite_numbers

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
# tensors of the MTP layer, after the prefix of the layer
MTP_EMBEDDING = "embed_tokens.weight"
MTP_HEAD = "shared_head.head.weight"
# joins hidden states and embeddings, and is FP8 in no release
MTP_JOIN = "eh_proj.weight"
# Bytes of the largest tensor whose numbers are checked: scales, norms, biases, and matrices of
# routers and indexers. A check of all matrices would take as long as reading them.
_MAX_CHECKED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint before conversion.

    Attributes:
        info: dtype, shape and place. The shape of FP4 counts bytes of two values.
        raw: uint8 [nbytes], the bytes, a read-only view of the file.
        scale: scales of an FP8 or FP4 tensor [blocks of rows, blocks of columns].
        block_size: rows and columns of an FP8 or FP4 tensor with one scale.
        packing: layout of a matrix in four bits; None = another tensor.
        parts: further tensors of a packed matrix, by the end of their name here.
        cut: axis, start and stop of the rows or columns of a packed matrix; None = all.
    """

    info: TensorInfo
    raw: np.ndarray
    scale: StoredTensor | None = None
    block_size: tuple[int, int] = (1, 1)
    packing: Packing | None = None
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)
    cut: tuple[int, int, int] | None = None

    def float32(self) -> np.ndarray:
        """Return float32 in the stored shape, or the shape of a matrix in four bits.

        Returns:
            A read-only view of the file for F32, else a new array.

        Raises:
            CheckpointError: a dtype that is not supported, or a scale that is NaN.
        """
        if self.packing is not None:
            values = self.packing.unpack(self._stored_parts())
            if self.cut is None:
                return values
            axis, start, stop = self.cut
            return values[start:stop] if axis == 0 else values[:, start:stop]
        if self.scale is None:
            return to_float32(self.raw, self.info)
        codes = self.raw.reshape(self.info.shape)
        if self.info.dtype == FP4:
            return dequantize_groups(codes, self.scale.float32())
        return dequantize_blocks(codes, self.scale.float32(), self.block_size)

    def check_numbers(self) -> None:
        """Refuse scales of FP8, and small tensors, that are not finite.

        A NaN in a router or an indexer changes choices, and leaves the logits finite. `float32` and
        `repack` check the scales of the other formats.

        Raises:
            CheckpointError: a number is NaN or infinite. The message has its place.
        """
        if self.scale is not None:
            self.scale.check_numbers()
        elif self.info.dtype in FLOAT_DTYPES and self.info.nbytes <= _MAX_CHECKED_BYTES:
            finite_numbers(self.info, self.raw)

    def repack(self) -> PackedMatrix:
        """Return all of a matrix in four bits, see `Packing.repack`."""
        if self.packing is not None:
            return self.packing.repack(self._stored_parts())
        assert self.scale is not None, self.info.name
        # for the check of the codes
        self.scale.float32()
        exponents = self.scale.raw.reshape(self.scale.info.shape)
        return self.raw.reshape(self.info.shape), exponents, None, 1.0

    def _stored_parts(self) -> dict[str, tuple[TensorInfo, np.ndarray]]:
        """Return the tensors of a packed matrix and their bytes, by the end of their name here."""
        parts = {end: (part.info, part.raw) for end, part in self.parts.items()}
        return {"": (self.info, self.raw), **parts}

    def wide_blocks(self) -> tuple[int, int]:
        """Return the result of `dequantize.wide_blocks`, (0, 0) without FP4."""
        if self.scale is None or self.info.dtype != FP4:
            return 0, 0
        exponents = self.scale.raw.reshape(self.scale.info.shape)
        return wide_blocks(self.raw.reshape(self.info.shape), exponents)

    def ids(self) -> np.ndarray:
        """Return int64 in the stored shape."""
        return self.raw.view("<i8").reshape(self.info.shape)

    def narrowed(self, axis: int, start: int, stop: int) -> StoredTensor:
        """Return rows (axis 0) or columns (axis 1) of a matrix, or values (axis 0) of a vector.

        The others are not read. An FP8 or FP4 matrix whose blocks the borders cut becomes float32.
        """
        if self.packing is not None:
            return replace(self, cut=(axis, start, stop))
        source, scale, block = self, None, self.block_size[axis]
        # two columns of FP4 are a byte
        per_cell = 2 if self.info.dtype == FP4 and axis == 1 else 1
        cut = start % block or (stop % block and stop < per_cell * self.info.shape[axis])
        if self.scale is not None and cut:
            values = np.ascontiguousarray(self.float32())
            info = replace(self.info, dtype="F32", shape=values.shape, nbytes=values.nbytes)
            source = StoredTensor(info, values.view(np.uint8).reshape(-1))
        elif self.scale is not None:
            scale = self.scale.narrowed(axis, start // block, -(-stop // block))
            start, stop = start // per_cell, stop // per_cell
        cells = source.raw.reshape(*source.info.shape, -1)
        cells = cells[start:stop] if axis == 0 else cells[:, start:stop]
        info = replace(source.info, shape=cells.shape[:-1], nbytes=cells.size)
        return StoredTensor(info, cells.reshape(-1), scale, self.block_size)


class RandomTensor:
    """Random numbers by name and seed, instead of a tensor of a checkpoint.

    Normal with variance 1 / (length of a row), so that activations keep their size. Norms are ones
    and biases zeros, so that experts are selected evenly.

    Args:
        shape: shape in a checkpoint.
        ids_below: one more than the largest number of a table of ids.
    """

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, ids_below: int = 0) -> None:
        self.shape, self.seed = shape, [seed, zlib.crc32(name.encode())]
        self._whole, self._part = (shape, self.seed), (slice(None),) * len(shape)
        self.ids_below = ids_below
        self.constant = float(name.endswith("weight")) if len(shape) == 1 else None
        self.deviation = shape[-1] ** -0.5

    def float32(self) -> np.ndarray:
        """Return float32 in the stored shape."""
        if self.constant is not None:
            return np.full(self.shape, self.constant, np.float32)
        shape, seed = self._whole
        values = np.random.default_rng(seed).standard_normal(shape, np.float32)[self._part]
        return values * np.float32(self.deviation)

    def ids(self) -> np.ndarray:
        """Return int64 of a uniform distribution."""
        return np.random.default_rng(self.seed).integers(0, self.ids_below, self.shape)

    def narrowed(self, axis: int, start: int, stop: int) -> RandomTensor:
        """Return rows (axis 0) or columns (axis 1) of a matrix, or values (axis 0) of a vector.

        On a device the part has other values, because they depend on its `shape` and `seed`.
        """
        part = copy(self)
        part.shape = *self.shape[:axis], stop - start, *self.shape[axis + 1 :]
        part.seed = [*self.seed, start]
        part._part = (slice(start, stop),) if axis == 0 else (slice(None), slice(start, stop))
        return part


SourceTensor = StoredTensor | RandomTensor
"""One tensor of a checkpoint. Weights of GEMMs are [out, in]."""
WeightLoader = Callable[[SourceTensor], None]
"""Function that fills a weight from the SourceTensor of one name."""
