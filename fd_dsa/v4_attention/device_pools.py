"""Memory of the layers of DeepSeek-V4 on a device: rings of windows, entries in blocks, states."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fd_dsa.cache_formats import CACHE_FORMATS, CacheFormat, v4_record_bytes
from fd_dsa.device.allocation import Allocate
from fd_dsa.models.deepseek_v4.config import CSA, WINDOW, DeepseekV4Config
from fd_dsa.tensor import Tensor


@dataclass(frozen=True, slots=True)
class DevicePools:
    """Pools of one layer. Only written values are read.

    Attributes:
        ring: [slots * (sliding_window + max_drafts), key], the newest keys of each slot: a row of
            the batch, or a snapshot of a row at a block's end. A key is head_dim values, or an FP8
            record (`fd_dsa.ops.v4_records`).
        entries: [num_blocks, entries of a block, key]; None in a window-only layer.
        index_entries: [num_blocks, entries of a block, index_head_dim or bytes of a record]; None
            without an indexer.
        states: float32 [slots * state_rows, values of a source]; None like `entries`.
    """

    ring: Tensor
    entries: Tensor | None = None
    index_entries: Tensor | None = None
    states: Tensor | None = None

    def by_block(self) -> list[Tensor]:
        """Return the pools in blocks, [num_blocks, ...] each."""
        return [pool for pool in (self.entries, self.index_entries) if pool is not None]


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """Shapes of the pools.

    Attributes:
        config: sizes of the model.
        dtype: format of keys and entries, a name of CACHE_FORMATS. States are float32.
        block_size: tokens of a block, a multiple of both compress rates.
        max_drafts: maximum number of drafts of a row. A rejected draft takes the place of no key
            and no source that a later step reads.
    """

    config: DeepseekV4Config
    dtype: str
    block_size: int
    max_drafts: int = 0

    @property
    def ring_rows(self) -> int:
        """Keys of the ring of a slot."""
        return self.config.sliding_window + self.max_drafts

    def state_rows(self, kind: str) -> int:
        """Return the sources of a slot in the states of a layer of a kind."""
        return self.config.pooled_tokens(kind) + self.max_drafts

    @property
    def is_fp8(self) -> bool:
        """True if keys and entries are FP8 records."""
        return CACHE_FORMATS[self.dtype].is_fp8

    def shapes(
        self, kind: str, num_blocks: int, num_rows: int, num_snapshots: int
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each pool of a layer of a kind."""
        model, width, slots = self.config, self.config.head_dim, num_rows + num_snapshots
        key, index_key = width, model.index_head_dim
        if self.is_fp8:
            key = v4_record_bytes(width, model.qk_rope_head_dim)
            # with a float32 scale
            index_key += 4
        found: dict[str, tuple[int, ...]] = {"ring": (slots * self.ring_rows, key)}
        if kind == WINDOW:
            return found
        ratio, source = model.compress_rates[kind], width
        halves, per_block = model.pooled_tokens(kind) // ratio, self.block_size // ratio
        if kind == CSA:
            source, num_rows = width + model.index_head_dim, slots
            found["index_entries"] = num_blocks, per_block, index_key
        return found | {
            "entries": (num_blocks, per_block, key),
            "states": (num_rows * self.state_rows(kind), 2 * halves * source),
        }

    def bytes_per_block(self) -> int:
        """Return the bytes of one block over all layers."""
        return self._bytes(num_blocks=1)

    def bytes_per_row(self) -> int:
        """Return the bytes of the rings and states of one row of the batch over all layers."""
        return self._bytes(num_rows=1)

    def bytes_per_snapshot(self) -> int:
        """Return the bytes of one snapshot over all layers."""
        return self._bytes(num_snapshots=1)

    def allocate(
        self, num_blocks: int, num_rows: int, num_snapshots: int, allocate: Allocate
    ) -> tuple[list[DevicePools], list[tuple[Tensor, int]]]:
        """Allocate the pools of every layer, with arbitrary contents.

        Returns:
            The pools; and tensors that have the pools with slots of snapshots, layer after layer,
            each with its number of layers.
        """
        # HCA layers have no states of snapshots, because no entry pools sources of two blocks
        counts, kinds = (num_blocks, num_rows, num_snapshots), self.config.layer_types
        wholes: dict[str, tuple[Tensor, int]] = {}
        for name, kind, layers in (("ring", WINDOW, len(kinds)), ("states", CSA, kinds.count(CSA))):
            if layers:
                size, width = self.shapes(kind, *counts)[name]
                whole = allocate((layers * size, width), self._format_of(name).device_dtype)
                wholes[name] = whole, layers
        found, used = [], dict.fromkeys(wholes, 0)
        for kind in kinds:
            pools = {}
            for name, shape in self.shapes(kind, *counts).items():
                if name == "ring" or (name, kind) == ("states", CSA):
                    begin, used[name] = used[name], used[name] + shape[0]
                    pools[name] = wholes[name][0][begin : begin + shape[0]]
                else:
                    pools[name] = allocate(shape, self._format_of(name).device_dtype)
            found.append(DevicePools(**pools))
        return found, [*wholes.values()]

    def _format_of(self, name: str) -> CacheFormat:
        return CACHE_FORMATS["float32" if name == "states" else self.dtype]

    def _bytes(self, num_blocks: int = 0, num_rows: int = 0, num_snapshots: int = 0) -> int:
        return sum(
            self._format_of(name).itemsize * math.prod(shape)
            for kind in self.config.layer_types
            for name, shape in self.shapes(kind, num_blocks, num_rows, num_snapshots).items()
        )
