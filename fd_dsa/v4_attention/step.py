"""What the tokens of a step attend to: lists of rows for decoding, tiles for chunks of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fd_dsa.models.deepseek_v4.config import CSA, HCA
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.logits.paddle_impl import PagedUnits
from fd_dsa.ops.mla.paddle_impl import KeyLists
from fd_dsa.v4_attention.pooling import PoolingPlan, RecordPlan
from fd_dsa.v4_prepare import V4Arrays

# scores of a tile, over all heads
_TILE_VALUES = 1 << 21
_MOST_TILE_TOKENS = 64
_NAMES = {CSA: "r1", HCA: "r2"}


@dataclass(frozen=True, slots=True)
class Tile:
    """Neighbouring tokens of one row that share a list of keys.

    Attributes:
        tokens: of the step.
        keys: int64 [n]; rows of the keys in the layer's pool, window first.
        mask: float32 [tokens, n]; 0 where a token sees the key, -inf elsewhere.
        num_window: window keys in the list.
    """

    tokens: slice
    keys: np.ndarray
    mask: np.ndarray
    num_window: int


class V4Step:
    """The work of one step, made once for all layers of a kind when the first of them asks.

    Tokens of rows that decode, and with one order of sums all tokens, gather their keys; those of
    prompts share a list with their neighbours.

    Args:
        out: the step's index arrays.
        start, q: int [rows]; first position of each row and its tokens in the step.
        block_table: int32 [rows, columns].
        num_heads: of the queries.
    """

    def __init__(
        self,
        out: V4Arrays,
        start: np.ndarray,
        q: np.ndarray,
        block_table: np.ndarray,
        num_heads: int,
    ) -> None:
        self._out, self._start, self._q = out, start, q
        self.block_table, self._num_heads = block_table, num_heads
        self._slots = np.arange(len(q), dtype=np.int64)
        self.num_tokens = int(out.counts[1])
        self.positions = out.positions[: self.num_tokens]
        self.rows = out.req_of_token[: self.num_tokens]
        self.window_rows = out.swa_write[: self.num_tokens]
        self._plans: dict[str, PoolingPlan] = {}
        self._lists: dict[str, KeyLists] = {}
        self._tiles: dict[str, list[Tile]] = {}

    def pooling(self, kind: str) -> PoolingPlan:
        """Which sources the layers of a kind pool and keep."""
        if kind not in self._plans:
            self._plans[kind] = PoolingPlan(self._out, _NAMES[kind], self._slots)
        return self._plans[kind]

    @cached_property
    def records(self) -> RecordPlan:
        return RecordPlan(self._out, self._start, self._q, self._slots, self.block_table)

    @cached_property
    def gathered(self) -> np.ndarray:
        """int [n]; tokens that gather their keys."""
        if fixed_order():
            return np.arange(self.num_tokens)
        return (self._q[self.rows] == 1).nonzero()[0]

    @cached_property
    def visible(self) -> np.ndarray:
        """int32 [num_tokens]; CSA entries that each token sees."""
        return self._out.csa_visible[: self.num_tokens]

    @cached_property
    def chooses(self) -> bool:
        """Whether a token sees more CSA entries than the indexer chooses."""
        return bool(self.visible.max(initial=0) > self._out.config.index_topk)

    @cached_property
    def units(self) -> tuple[np.ndarray, PagedUnits] | None:
        """Decoding tokens that see an entry, and their blocks of index entries."""
        at = (self._q[self.rows] == 1).nonzero()[0]
        at = at[self.visible[at] > 0]
        if not len(at):
            return None
        per_block = self.entries_per_block(CSA)
        return at, PagedUnits.build(self.visible[at], self.block_table[self.rows[at]], per_block)

    def prompt_rows(self) -> Iterator[tuple[slice, int]]:
        """Tokens and row of each row with several tokens in the step."""
        bounds = self._out.cu_q
        for row in (self._q > 1).nonzero()[0].tolist():
            yield slice(int(bounds[row]), int(bounds[row + 1])), row

    def entries_per_block(self, kind: str) -> int:
        cfg = self._out.config
        return cfg.block_size // (cfg.csa_ratio if kind == CSA else cfg.hca_ratio)

    def entry_rows(self, kind: str, rows: npt.ArrayLike, count: int) -> np.ndarray:
        """int64 [len(rows), count]; where the first entries of rows are, without `comp_base`."""
        per_block, entry = self.entries_per_block(kind), np.arange(count)
        columns = np.minimum(entry // per_block, self.block_table.shape[1] - 1)
        blocks = self.block_table[np.asarray(rows)[:, None], columns].astype(np.int64)
        return blocks * per_block + entry % per_block

    @cached_property
    def window_list(self) -> np.ndarray:
        """int32 [gathered tokens, window]; rows of their window keys, -1 = none."""
        out, at = self._out, self.gathered
        lengths, extra = out.win_len[at], out.ext_len[at]
        width = out.win_idx.shape[1]
        if not fixed_order():
            width = int((lengths + extra).max(initial=0))
        found: np.ndarray = out.win_idx[at, :width]
        if extra.any():
            # keys of the step are in the pool too: in pages every token has its row
            column = np.arange(width)
            token = at[:, None] - extra[:, None] + 1 + column - lengths[:, None]
            is_own = (column >= lengths[:, None]) & (token <= at[:, None])
            found = np.where(is_own, out.swa_write[np.minimum(token, at[:, None])], found)
        return found

    def key_lists(self, kind: str) -> KeyLists:
        """Rows of `window_list`, then of all entries of layers of a kind that each token sees."""
        if kind not in self._lists:
            at, keys = self.gathered, self.window_list
            if kind in _NAMES:
                visible = self.visible[at] if kind == CSA else self._hca_visible[at]
                count = int(visible.max(initial=0))
                entries = self._out.config.comp_base + self.entry_rows(kind, self.rows[at], count)
                entries[np.arange(count) >= visible[:, None]] = -1
                keys = np.concatenate((keys, entries.astype(np.int32)), axis=1)
            self._lists[kind] = KeyLists(keys)
        return self._lists[kind]

    def tiles(self, kind: str) -> list[Tile]:
        """Tokens of prompts with their keys, in layers of a kind."""
        if kind not in self._tiles:
            self._tiles[kind] = []
            if not fixed_order():
                for tokens, row in self.prompt_rows():
                    self._tiles[kind] += self._row_tiles(kind, tokens, row)
        return self._tiles[kind]

    @cached_property
    def _hca_visible(self) -> np.ndarray:
        """int32 [num_tokens]; HCA entries that each token sees."""
        return np.diff(self._out.hca_indptr[: self.num_tokens + 1])

    def _row_tiles(self, kind: str, tokens: slice, row: int) -> Iterator[Tile]:
        out, window = self._out, self._out.config.window_size
        last, visible = int(self.positions[tokens.stop - 1]), None
        if kind in _NAMES:
            visible = self.visible if kind == CSA else self._hca_visible
        most = 0 if visible is None else int(visible[tokens.stop - 1])
        width = min(last + 1, window + _MOST_TILE_TOKENS) + most
        size = max(1, min(_MOST_TILE_TOKENS, _TILE_VALUES // (width * self._num_heads)))
        for begin in range(tokens.start, tokens.stop, size):
            end = min(begin + size, tokens.stop)
            own = out.swa_write[begin + 1 - int(out.ext_len[begin]) : end]
            keys = np.concatenate((out.win_idx[begin, : int(out.win_len[begin])], own))
            position = self.positions[begin:end, None]
            key_position = int(self.positions[end - 1]) + 1 - len(keys) + np.arange(len(keys))
            hidden = (key_position > position) | (key_position <= position - window)
            num_window = len(keys)
            if visible is not None:
                seen = visible[begin:end]
                count = int(seen[-1])
                entries = out.config.comp_base + self.entry_rows(kind, [row], count)[0]
                keys = np.concatenate((keys, entries))
                unseen = np.arange(count) >= seen[:, None]
                hidden = np.concatenate((hidden, unseen), axis=1)
            mask = np.where(hidden, np.float32(-np.inf), np.float32(0.0))
            yield Tile(slice(begin, end), keys.astype(np.int64), mask, num_window)
