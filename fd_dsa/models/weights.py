"""Weights of a model in host memory.

A layer asks for its weights by their Hugging Face names. This module decides how they are held;
`device_weights.py` has a class with the same methods for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import paddle

from fd_dsa.distributed import Group
from fd_dsa.errors import CheckpointError
from fd_dsa.models.moe import gated
from fd_dsa.models.sources import SourceTensor, WeightLoader
from fd_dsa.ops.host_gemm import HostMatrix
from fd_dsa.ops.host_rows import HostNorm


class HostWeights:
    """Weights in float32. Weights of GEMMs are [in, out].

    Attributes:
        group: ranks that share the model; None = one rank.
        loaders: function that fills the place of each tensor of a checkpoint. Together they fill
            every weight.
        fp8: names of the tensors that are held as FP8.
    """

    are_on_device = False
    fp8: Collection[str] = frozenset()

    def __init__(self, group: Group | None = None) -> None:
        self.group = group
        self.loaders: dict[str, WeightLoader] = {}
        self._matrices: list[HostMatrix] = []

    def vector(self, parts: Mapping[str, int], factor: float = 1.0) -> np.ndarray:
        """Return vectors end to end, such as norms' weights, times a factor.

        Args:
            parts: name and length of each.

        Returns:
            float32 [sum of the lengths].
        """
        values, start = np.empty(sum(parts.values()), np.float32), 0
        for name, length in parts.items():
            self.fills(name, values[start : start + length], factor)
            start += length
        return values

    def bias(self, parts: Mapping[str, int]) -> np.ndarray:
        """Return a `vector` for the results of a GEMM, on a device in their dtype."""
        return self.vector(parts)

    def norm(self, name: str, width: int, epsilon: float) -> HostNorm:
        """Return an RMSNorm with a weight."""
        return HostNorm(self.vector({name: width}), epsilon)

    def table(self, name: str, rows: int, width: int) -> tuple[np.ndarray, HostMatrix]:
        """Return the embedding [rows, width], and its memory as the weight of a head."""
        head = HostMatrix(_empty(rows, width), transposed=True)
        self.fills(name, head.array)
        return head.array, head

    def matrix(
        self,
        in_width: int,
        parts: Mapping[str, int],
        *,
        sums_in_float32: bool = False,
    ) -> HostMatrix:
        """Return the weight of a GEMM whose outputs are those of the parts side by side.

        Args:
            parts: name and output width of each.
            sums_in_float32: True if results must be float32.
        """
        return self.columns(in_width, parts, {})

    def columns(
        self, in_width: int, parts: Mapping[str, int], factors: Mapping[str, float]
    ) -> HostMatrix:
        """Return a `matrix` some of whose parts are multiplied when they are loaded.

        On a device it is a tensor [in, out] per part.

        Args:
            factors: factor by name of a part, 1 for the others.
        """
        weight, start = HostMatrix(_empty(in_width, sum(parts.values()))), 0
        for name, width in parts.items():
            columns = weight.array[:, start : start + width]
            self.fills(name, columns.T, factors.get(name, 1.0))
            start += width
        self._matrices.append(weight)
        return weight

    def placed(self, in_width: int, places: Mapping[str, Sequence[tuple[int, int]]]) -> HostMatrix:
        """Return a `matrix` whose parts need not be side by side.

        Args:
            places: first column and width of the pieces that the rows of a part fill in turn, by
                name.
        """
        spans = [span for pieces in places.values() for span in pieces]
        weight = HostMatrix(_empty(in_width, sum(width for _, width in spans)))
        for name, pieces in places.items():
            self.loaders[name] = partial(_fill_pieces, weight.array, pieces)
        self._matrices.append(weight)
        return weight

    def grouped(self, name: str, groups: int, in_width: int, out_width: int) -> HostMatrix:
        """Return the weight [groups, in_width, out_width] of a GEMM per group."""
        weight = HostMatrix(_empty(groups, in_width, out_width))

        def load(source: SourceTensor) -> None:
            stored = source.float32().reshape(groups, out_width, in_width)
            np.copyto(weight.array, stored.transpose(0, 2, 1))

        self.loaders[name] = load
        return weight

    def ids(self, name: str, rows: int, width: int, below: int) -> np.ndarray:
        """Return a table of ids from 0 to below `below`, int32 [rows, width].

        Its loader raises CheckpointError for another id.
        """
        table = np.zeros((rows, width), np.int32)

        def load(source: SourceTensor) -> None:
            table[...] = checked_ids(name, source, below)

        self.loaders[name] = load
        return table

    def by_head(
        self, name: str, heads: int, key_width: int, value_width: int, rank: int
    ) -> tuple[HostMatrix, HostMatrix]:
        """Return both halves of each head of kv_b_proj.

        Returns:
            Weights [heads, key_width, rank] and [heads, rank, value_width].
        """
        keys = HostMatrix(_empty(heads, key_width, rank))
        values = HostMatrix(_empty(heads, rank, value_width))

        def load(source: SourceTensor) -> None:
            for half, weight in zip(
                halves_of_heads(source, heads, key_width, rank), (keys, values), strict=True
            ):
                np.copyto(weight.array, half)

        self.loaders[name] = load
        return keys, values

    def experts(
        self, prefix: str, count: int, hidden_size: int, width: int
    ) -> list[tuple[HostMatrix, HostMatrix]]:
        """Return gate_up and down of each expert."""
        return [gated(self, f"{prefix}{i}.", hidden_size, width) for i in range(count)]

    def constant(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return a table of float32 that is computed and not loaded."""
        return make()

    def finish(self) -> None:
        """Finish loading: pack large weights into the GEMM layout, in place."""
        while self._matrices:
            self._matrices.pop().pack()

    def fills(self, name: str, target: np.ndarray, factor: float = 1.0) -> None:
        """Register a loader that copies the tensor `name` to `target`, times a factor."""

        def load(source: SourceTensor) -> None:
            np.copyto(target, source.float32().reshape(target.shape))
            if factor != 1.0:
                np.multiply(target, np.float32(factor), out=target)

        self.loaders[name] = load


def checked_ids(name: str, source: SourceTensor, below: int) -> np.ndarray:
    """Return the ids of a table.

    Raises:
        CheckpointError: an id is not from 0 to below `below`.
    """
    ids = source.ids()
    if ids.min() < 0 or ids.max() >= below:
        raise CheckpointError(
            f"tensor {name!r}: has numbers from {ids.min()} to {ids.max()}, allowed are 0 "
            f"to {below - 1}"
        )
    return ids


def halves_of_heads(
    source: SourceTensor, heads: int, key_width: int, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the halves of kv_b_proj: [heads, keys, rank], [heads, rank, values]."""
    per_head = source.float32().reshape(heads, -1, rank)
    return per_head[:, :key_width], per_head[:, key_width:].transpose(0, 2, 1)


def _fill_pieces(
    target: np.ndarray, pieces: Sequence[tuple[int, int]], source: SourceTensor
) -> None:
    """Fill columns of `target` [in, out] with the rows of a tensor [out, in]."""
    values, start = source.float32(), 0
    for column, width in pieces:
        target[:, column : column + width] = values[start : start + width].T
        start += width


def _empty(*shape: int) -> Any:
    """Return an unfilled float32 Paddle tensor in host memory."""
    return paddle.empty(list(shape), "float32")
