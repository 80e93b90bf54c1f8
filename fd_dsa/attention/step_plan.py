"""Work lists of one step on a CPU, made once and used by every layer.

The step's metadata determine the tokens that need scores, the keys of a tile of tokens, and the
slots of tokens without a selection. So the layers share them. A prompt token sees the keys of its
window in `indexer_attn_mask_offsets`.

A token whose window has at most `index_topk` keys attends to all of them. It needs no scores, and
has the same slots in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.ops.cache_write import places
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.key_bounds import key_bounds, positions_to_slots
from fd_dsa.ops.logits.host_scores import PagedUnits
from fd_dsa.ops.mla import KeyLists
from fd_dsa.step import ForwardMeta

TILE_VALUES = 8 << 20
"""Max values in the score matrix of an attention tile, 32 MiB of float32."""
SCORE_TILE_VALUES = 2 << 20
"""Max values in the score matrix of a scoring tile, 8 MiB, which stay in the cache."""
GATHER_COST = 16
"""Number of heads whose dot products with a key cost as much as gathering the key.

A tile attends densely if it has at most 1 + GATHER_COST / num_heads times the selection in keys.
"""
DENSE_KEYS = 768
"""Max keys of a tile that attends densely for any selection."""
JOINED_KEYS = 128
"""Max keys of a tile that several short rows share."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Neighbouring prefill tokens and the keys of the rows they belong to.

    Attributes:
        tokens: slice of the step's flat tokens.
        key_slots: int64 [num_keys]; cache slots of the keys of the tile's rows, in order.
        key_position: int64 [num_keys]; position of each key in its row.
        key_start: int64 [num_tokens of the tile]; index in `key_slots` of the row's first key.
        window_start: int64 [num_tokens of the tile]; index in `key_slots` of the first key that a
            token sees; None = 0 for all tokens.
        window: int64 [num_tokens of the tile]; number of keys that a token sees.
    """

    tokens: slice
    key_slots: np.ndarray
    key_position: np.ndarray
    key_start: np.ndarray
    window_start: np.ndarray | None
    window: np.ndarray

    def mask(self, slots: np.ndarray, slot_position: np.ndarray) -> np.ndarray:
        """Return an additive mask, float32 [tokens, num_keys], 0 at the selected keys.

        Args:
            slots: int32 [tokens, k]; selected slots of each token, -1 = padding.
            slot_position: int32 [num_slots]; position in its row of each slot of `key_slots`.
        """
        num_keys = len(self.key_slots)
        position = slot_position[np.maximum(slots, 0)]
        columns = np.where(slots >= 0, self.key_start[:, None] + position, num_keys)
        mask = np.full((len(slots), num_keys + 1), -np.inf, np.float32)
        np.put_along_axis(mask, columns, np.float32(0), axis=1)
        return mask[:, :num_keys]


class StepPlan:
    """Work lists that the layers of a step share, in addition to ForwardMeta.

    Args:
        meta: metadata of the step. The plan reads its arrays only when it is made.
        slots: int32 [max_num_tokens * index_topk]; buffer of the caller for the selection.

    Attributes:
        slots: int32 [num_padded_tokens, topk]; selected slots of each token, -1 = padding.
        topk: width of the selection, at most `index_topk`.
        num_tokens: tokens of the step without padding.
        batch_ids: int64 [num_tokens]; row of each token.
        first_key, window: int64 [num_tokens]; first key that a token sees, and their number.
        has_late_windows: True if a window begins after the first key of its row.
        needs_scores: True if a token sees more than `index_topk` keys.
        score_tiles: tiles of the prompt tokens that need scores.
        dense_tiles: tiles of the prompt tokens that attend densely.
        decode_rows: see `_decode_rows`.
    """

    def __init__(self, meta: ForwardMeta, config: DSABackendConfig, slots: np.ndarray) -> None:
        index_topk, num_heads = config.index_topk, config.num_heads
        self.block_size = config.cache_layout.block_size
        self.cu = as_numpy(meta.cu_seqlens_q).astype(np.int64)
        self.num_tokens = int(self.cu[-1])
        self.batch_ids = as_numpy(meta.batch_id_per_token)[: self.num_tokens].astype(np.int64)
        self.first_key, end = key_bounds(meta, self.num_tokens)
        self.window = end - self.first_key
        self.has_late_windows = meta.num_prefill_tokens > 0 and bool(self.first_key.any())
        self.block_tables = as_numpy(meta.block_tables)
        self.lengths = as_numpy(meta.seq_lens_decoder).astype(np.int64) + as_numpy(
            meta.seq_lens_this_time
        )
        self.this_time = as_numpy(meta.seq_lens_this_time)
        self.is_prefill_row = as_numpy(meta.seq_lens_encoder) > 0
        self.index_topk = index_topk
        self.topk = max(1, min(index_topk, meta.max_seqlen_k))
        num_padded_tokens = meta.position_ids.shape[0]
        self.slots = slots[: num_padded_tokens * self.topk].reshape(-1, self.topk)
        self.needs_scores = bool((self.window > index_topk).any())
        self._keys: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
        self._slot_mapping = meta.slot_mapping
        self._places: tuple[int, Any] | None = None
        self._fill_slots()
        if self.has_late_windows:
            self._fill_late_slots()
        self.score_tiles: tuple[Tile, ...] = ()
        self.dense_tiles: tuple[Tile, ...] = ()
        if meta.num_prefill_tokens:
            self.score_tiles = self._prefill_tiles(
                config.index_n_heads, self.window > index_topk, None
            )
            limit = max(round((1 + GATHER_COST / num_heads) * self.topk), DENSE_KEYS)
            # in a fixed order of sums a token's form must not depend on the length of its row
            dense = self.window > 0
            if fixed_order():
                dense &= self.window <= index_topk
            self.dense_tiles = self._prefill_tiles(num_heads, dense, limit)
        self.decode_rows = self._decode_rows() if self.needs_scores else None

    def places_in(self, num_blocks: int) -> Any:
        """Return the places of the step's keys in a cache of `num_blocks`, for `store_keys`."""
        if self._places is None or self._places[0] != num_blocks:
            slots = as_numpy(self._slot_mapping)
            self._places = num_blocks, places(slots, num_blocks, self.block_size)
        return self._places[1]

    @cached_property
    def selection(self) -> Any:
        """`slots` as a tensor."""
        return as_tensor(self.slots)

    def _fill_slots(self) -> None:
        """Fill the slots of tokens whose windows begin at the first key of their rows."""
        active = np.flatnonzero(self.this_time > 0)
        positions = np.arange(self.topk, dtype=np.int32)[None, :]
        known = np.minimum(positions, self.lengths[active][:, None].astype(np.int32) - 1)
        row_slots = np.zeros((len(self.this_time), self.topk), np.int32)
        row_slots[active] = positions_to_slots(known, active, self.block_tables, self.block_size)
        self.slots[self.num_tokens :] = -1
        seen = positions < self.window[:, None]
        self.slots[: self.num_tokens] = np.where(seen, row_slots[self.batch_ids], -1)

    def _fill_late_slots(self) -> None:
        """Fill the slots of tokens whose windows begin after the first key of their rows."""
        later = np.flatnonzero(self.first_key)
        offset = np.arange(self.topk)
        known = self.first_key[later, None] + offset
        known[offset >= self.window[later, None]] = -1
        row = self.batch_ids[later]
        self.slots[later] = positions_to_slots(known, row, self.block_tables, self.block_size)

    def _decode_rows(self) -> tuple[np.ndarray, np.ndarray, PagedUnits] | None:
        """Return the decode rows in which a token needs scores, or None without such a row.

        Returns:
            Flat tokens of each row, int64 [num_rows, n], the last one repeated up to n. Number of
            keys that each of them sees, int64 [num_rows * n]. Pages of the rows.
        """
        rows = np.flatnonzero(
            ~self.is_prefill_row & (self.this_time > 0) & (self.lengths > self.index_topk)
        )
        if not len(rows):
            return None
        count = self.this_time[rows].astype(np.int64)
        offsets = np.minimum(np.arange(int(count.max()))[None, :], count[:, None] - 1)
        tokens = self.cu[rows][:, None] + offsets
        units = PagedUnits.build(self.lengths[rows], self.block_tables[rows], self.block_size)
        return tokens, self.window[tokens].ravel(), units

    def _prefill_tiles(
        self, heads: int, wanted: np.ndarray, max_keys: int | None
    ) -> tuple[Tile, ...]:
        """Cut prefill tokens into tiles within the budget of a score matrix.

        Args:
            heads: rows of the score matrix for each token.
            wanted: bool [num_tokens]; tokens that need a tile.
            max_keys: max keys of a row with a tile; None = any. With it, short rows share a tile
                only up to `JOINED_KEYS` keys, because a token pays for its neighbours' keys.
        """
        needs_tile = wanted & self.is_prefill_row[self.batch_ids]
        if max_keys is not None:
            needs_tile &= self.lengths[self.batch_ids] <= max_keys
        index = np.flatnonzero(needs_tile)
        tiles = []
        start = 0
        while start < len(index):
            end = self._tile_end(index, start, heads, max_keys)
            tiles.append(self._tile(int(index[start]), int(index[end - 1]) + 1))
            start = end
        return tuple(tiles)

    def _tile_end(self, index: np.ndarray, start: int, heads: int, max_keys: int | None) -> int:
        """Return the end of the tile that starts at `start`.

        Args:
            index: flat tokens that need a tile. `start` and the result are indices of this array.
            heads, max_keys: see `_prefill_tiles`.
        """
        run = index[start:]
        consecutive = np.flatnonzero(np.diff(run) != 1)
        run = run[: consecutive[0] + 1] if len(consecutive) else run
        row = self.batch_ids[run]
        new_row = np.concatenate(([True], row[1:] != row[:-1]))
        keys = np.cumsum(np.where(new_row, self.lengths[row], 0))
        values = SCORE_TILE_VALUES if max_keys is None else TILE_VALUES
        fits = keys * np.arange(1, len(run) + 1) * heads <= values
        if max_keys is not None:
            joined = 0 if fixed_order() else min(JOINED_KEYS, max_keys)
            fits &= keys <= max(joined, self.lengths[row[0]])
        # both sizes grow along the run, and a tile has at least one token
        return start + max(1, int(fits.sum()))

    def _tile(self, first: int, last: int) -> Tile:
        """Return the tile of the flat tokens [first, last)."""
        token_rows = self.batch_ids[first:last]
        rows = np.unique(token_rows)
        ends = np.cumsum(self.lengths[rows])
        key_start = (ends - self.lengths[rows])[np.searchsorted(rows, token_rows)]
        slots, position = self._keys_of(tuple(rows.tolist()))
        tokens = slice(first, last)
        start = key_start + self.first_key[tokens]
        window_start = start if start.any() else None
        return Tile(tokens, slots, position, key_start, window_start, self.window[tokens])

    def _keys_of(self, rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return slots and positions of all keys of some rows, int64, in the order of the rows.

        Tiles of the same rows share them, because a long prompt has many tiles.
        """
        if rows not in self._keys:
            lengths = self.lengths[list(rows)]
            row = np.repeat(rows, lengths)
            position = np.concatenate([np.arange(length) for length in lengths.tolist()])
            slots = positions_to_slots(position[:, None], row, self.block_tables, self.block_size)
            self._keys[rows] = slots.ravel().astype(np.int64), position
        return self._keys[rows]

    @cached_property
    def gathered_tokens(self) -> np.ndarray:
        """Tokens outside of the dense tiles, int64 [n]."""
        if not self.dense_tiles:
            return np.arange(self.num_tokens)
        covered = np.zeros(self.num_tokens, bool)
        for tile in self.dense_tiles:
            covered[tile.tokens] = True
        return np.flatnonzero(~covered)

    @cached_property
    def key_lists(self) -> KeyLists:
        """Slots of the gathered tokens, for a step in which all layers share the selection."""
        return KeyLists(self.slots[self.gathered_tokens])

    @cached_property
    def masks(self) -> tuple[np.ndarray, ...]:
        """Masks of the dense tiles, for a step in which all layers share the selection."""
        return tuple(t.mask(self.slots[t.tokens], self.slot_position) for t in self.dense_tiles)

    @cached_property
    def slot_position(self) -> np.ndarray:
        """Position in its row of each slot of the dense tiles, int32 [num_slots]."""
        size = 1 + max(int(tile.key_slots.max()) for tile in self.dense_tiles)
        table = np.empty(size, np.int32)
        for tile in self.dense_tiles:
            table[tile.key_slots] = tile.key_position
        return table
