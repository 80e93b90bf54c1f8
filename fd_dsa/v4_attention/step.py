"""Keys that a step's tokens attend to: row lists for decoding, tiles for prefill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fd_dsa.models.deepseek_v4.config import CSA, HCA
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.logits.host_scores import PagedUnits
from fd_dsa.ops.mla import KeyLists
from fd_dsa.v4_attention.pooling import PoolingPlan, RecordPlan
from fd_dsa.v4_prepare import V4Arrays

# limit for the scores of a tile, over all heads
_TILE_VALUES = 1 << 21
_MAX_TILE_TOKENS = 64
_NAMES = {CSA: "r1", HCA: "r2"}


@dataclass(frozen=True, slots=True)
class Tile:
    """Adjacent tokens of one row that share a list of keys.

    Attributes:
        tokens: range of the step's tokens.
        keys: int64 [n], rows of the keys in the layer's pool, window keys at the front.
        mask: float32 [tokens, n], 0 if the token sees the key, otherwise -inf.
        num_window: number of window keys in the list.
    """

    tokens: slice
    keys: np.ndarray
    mask: np.ndarray
    num_window: int


class V4Step:
    """The work of one step, computed on first use and shared by all layers of a kind.

    Tokens of decode rows gather their keys, as do all tokens in batch-invariant mode. A decode row
    has a token and its drafts. Tokens of prompts share a key list with adjacent tokens.

    Args:
        out: the step's index arrays.
        start, q: int [rows], first position of each row and its number of tokens in the step.
        block_table: int32 [rows, columns].
        num_heads: number of query heads.
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
        self._is_prompt = q > 1 + out.config.spec_tokens
        self.num_tokens = int(out.counts[1])
        self.positions = out.positions[: self.num_tokens]
        self.rows = out.req_of_token[: self.num_tokens]
        self.window_rows = out.swa_write[: self.num_tokens]
        self._plans: dict[str, PoolingPlan] = {}
        self._lists: dict[str, KeyLists] = {}
        self._tiles: dict[str, list[Tile]] = {}

    def pooling(self, kind: str) -> PoolingPlan:
        """Return the plan of pooled and kept sources for the layers of a kind."""
        if kind not in self._plans:
            self._plans[kind] = PoolingPlan(self._out, _NAMES[kind], self._slots)
        return self._plans[kind]

    @cached_property
    def records(self) -> RecordPlan:
        return RecordPlan(self._out, self._start, self._q, self._slots, self.block_table)

    @cached_property
    def gathered(self) -> np.ndarray:
        """int [n], tokens that gather their keys."""
        if fixed_order():
            return np.arange(self.num_tokens)
        return self._decoding

    @cached_property
    def _decoding(self) -> np.ndarray:
        """int [n], tokens of decode rows."""
        return (~self._is_prompt[self.rows]).nonzero()[0]

    @cached_property
    def visible(self) -> np.ndarray:
        """int32 [num_tokens], number of CSA entries visible to each token."""
        return self._out.csa_visible[: self.num_tokens]

    @cached_property
    def needs_selection(self) -> bool:
        """True if a token sees more CSA entries than the indexer selects."""
        return bool(self.visible.max(initial=0) > self._out.config.index_topk)

    @cached_property
    def units(self) -> tuple[np.ndarray, PagedUnits] | None:
        """Decoding tokens that see an entry, with their blocks of index entries, or None."""
        at = self._decoding
        at = at[self.visible[at] > 0]
        if not len(at):
            return None
        per_block = self.entries_per_block(CSA)
        return at, PagedUnits.build(self.visible[at], self.block_table[self.rows[at]], per_block)

    def prompt_rows(self) -> Iterator[tuple[slice, int]]:
        """Yield tokens and row of each row that is no decode row."""
        bounds = self._out.cu_q
        for row in self._is_prompt.nonzero()[0].tolist():
            yield slice(int(bounds[row]), int(bounds[row + 1])), row

    def entries_per_block(self, kind: str) -> int:
        cfg = self._out.config
        return cfg.block_size // (cfg.csa_ratio if kind == CSA else cfg.hca_ratio)

    def entry_rows(self, kind: str, rows: npt.ArrayLike, count: int) -> np.ndarray:
        """Return pool rows of the rows' first entries, less `comp_base`, int64 [rows, count]."""
        per_block, entry = self.entries_per_block(kind), np.arange(count)
        columns = np.minimum(entry // per_block, self.block_table.shape[1] - 1)
        blocks = self.block_table[np.asarray(rows)[:, None], columns].astype(np.int64)
        return blocks * per_block + entry % per_block

    @cached_property
    def window_list(self) -> np.ndarray:
        """int32 [gathered tokens, window], rows of their window keys, padded with -1."""
        out, at = self._out, self.gathered
        lengths, extra = out.win_len[at], out.ext_len[at]
        width = out.win_idx.shape[1]
        if not fixed_order():
            width = int((lengths + extra).max(initial=0))
        found: np.ndarray = out.win_idx[at, :width]
        if extra.any():
            # keys of the step are in the pool too, because in pages every token has a row
            column = np.arange(width)
            token = at[:, None] - extra[:, None] + 1 + column - lengths[:, None]
            is_own = (column >= lengths[:, None]) & (token <= at[:, None])
            found = np.where(is_own, out.swa_write[np.clip(token, 0, at[:, None])], found)
        return found

    def key_lists(self, kind: str) -> KeyLists:
        """Return `window_list`, extended by all visible entries of layers of a kind."""
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
        """Return tiles of prompt tokens with their keys, for layers of a kind."""
        if kind not in self._tiles:
            self._tiles[kind] = []
            if not fixed_order():
                for tokens, row in self.prompt_rows():
                    self._tiles[kind] += self._row_tiles(kind, tokens, row)
        return self._tiles[kind]

    @cached_property
    def _hca_visible(self) -> np.ndarray:
        """int32 [num_tokens], number of HCA entries visible to each token."""
        return np.diff(self._out.hca_indptr[: self.num_tokens + 1])

    def _row_tiles(self, kind: str, tokens: slice, row: int) -> Iterator[Tile]:
        out, window = self._out, self._out.config.window_size
        last, visible = int(self.positions[tokens.stop - 1]), None
        if kind in _NAMES:
            visible = self.visible if kind == CSA else self._hca_visible
        num_entries = 0 if visible is None else int(visible[tokens.stop - 1])
        width = min(last + 1, window + _MAX_TILE_TOKENS) + num_entries
        size = max(1, min(_MAX_TILE_TOKENS, _TILE_VALUES // (width * self._num_heads)))
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
