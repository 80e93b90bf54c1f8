"""What weights are filled from: tensors of a checkpoint, or random numbers in their place."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fd_dsa.models.dequantize import TensorInfo, dequantize_blocks, to_float32

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
# of the layer for multi-token prediction, after what names of its tensors begin with
MTP_EMBEDDING = "embed_tokens.weight"
MTP_HEAD = "shared_head.head.weight"
# joins hidden states and embeddings; no release has it as FP8
MTP_JOIN = "eh_proj.weight"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, not yet converted.

    Attributes:
        info: its dtype, shape and place.
        raw: uint8 [nbytes], its bytes; a read-only view of the file.
        scale: of FP8, its multipliers, float32 [blocks of rows, blocks of columns].
        block_size: of FP8, rows and columns of a block.
    """

    info: TensorInfo
    raw: np.ndarray
    scale: StoredTensor | None = None
    block_size: tuple[int, int] = (1, 1)

    def float32(self) -> np.ndarray:
        """float32 in the stored shape; a read-only view of the file for F32, else a new array.

        Raises:
            CheckpointError: a dtype that is not supported.
        """
        if self.scale is None:
            return to_float32(self.raw, self.info)
        codes = self.raw.reshape(self.info.shape)
        return dequantize_blocks(codes, self.scale.float32(), self.block_size)

    def ids(self) -> np.ndarray:
        """int64 in the stored shape."""
        return self.raw.view("<i8").reshape(self.info.shape)

    def narrowed(self, axis: int, start: int, stop: int) -> StoredTensor:
        """Rows (axis 0) or columns (axis 1) of a matrix; no others are read.

        FP8 whose blocks the borders cut becomes float32.
        """
        source, scale, block = self, None, self.block_size[axis]
        if self.scale is not None:
            if start % block or (stop % block and stop < self.info.shape[axis]):
                values = np.ascontiguousarray(self.float32())
                info = replace(self.info, dtype="F32", nbytes=values.nbytes)
                source = StoredTensor(info, values.view(np.uint8).reshape(-1))
            else:
                scale = self.scale.narrowed(axis, start // block, -(-stop // block))
        rows, columns = source.info.shape
        cells = source.raw.reshape(rows, columns, -1)
        cells = cells[start:stop] if axis == 0 else cells[:, start:stop]
        info = replace(source.info, shape=cells.shape[:2], nbytes=cells.size)
        return StoredTensor(info, cells.reshape(-1), scale, self.block_size)


class RandomTensor:
    """Random numbers instead of a tensor of a checkpoint, by its name and a seed alone.

    Normal with variance 1 / (length of a row), so activations keep their size; norms are ones and
    biases zeros, so experts are chosen evenly.

    Args:
        shape: as a checkpoint would store it.
        ids_below: of a table of numbers, more than the highest.
    """

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, ids_below: int = 0) -> None:
        self.shape, self.seed = shape, [seed, zlib.crc32(name.encode())]
        self._whole, self._part = (shape, self.seed), (slice(None),) * len(shape)
        self.ids_below = ids_below
        self.constant = float(name.endswith("weight")) if len(shape) == 1 else None
        self.deviation = shape[-1] ** -0.5

    def float32(self) -> np.ndarray:
        if self.constant is not None:
            return np.full(self.shape, self.constant, np.float32)
        shape, seed = self._whole
        values = np.random.default_rng(seed).standard_normal(shape, np.float32)[self._part]
        return values * np.float32(self.deviation)

    def ids(self) -> np.ndarray:
        """int64, evenly drawn."""
        return np.random.default_rng(self.seed).integers(0, self.ids_below, self.shape)

    def narrowed(self, axis: int, start: int, stop: int) -> RandomTensor:
        """See StoredTensor; a device, which draws by `shape` and `seed`, makes up other values."""
        part = copy(self)
        rows, columns = self.shape
        part.shape = (stop - start, columns) if axis == 0 else (rows, stop - start)
        part.seed = [*self.seed, start]
        part._part = (slice(start, stop),) if axis == 0 else (slice(None), slice(start, stop))
        return part


SourceTensor = StoredTensor | RandomTensor
"""One tensor of a checkpoint: weights of GEMMs are [out, in]."""
WeightLoader = Callable[[Any], None]
"""Takes the SourceTensor of one name, and fills what is held of it."""
