"""How the tokens of a step on a device are scored and choose their keys: by our kernel or another.

Both take the same tensors and fill the same slots, in chunks of tokens under one limit of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.ops._copy import copy_rows
from fd_dsa.ops.indexer_gather.triton_kernel import gather_indexer_keys
from fd_dsa.ops.indexer_logits.deep_gemm import SCORE_TILE, DeepGemm, as_e4m3
from fd_dsa.ops.indexer_logits.token_rows import TokenRows, fill_token_rows
from fd_dsa.ops.indexer_logits.triton_kernel import score_pages
from fd_dsa.ops.topk.device import slot_selector
from fd_dsa.step import ForwardMeta
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.transfers import Transfers

_GATHERED_BYTES = 64 << 20
"""Most memory for the gathered keys of a step's prompts; longer ones are scored in their pages."""
_LEAST_ROWS, _ROW_STEP = 32, 1024


def rounded_length(length: int, least: int, most: int) -> int:
    """The next power of two from `least` on, but no more than `most`."""
    return min(max(least, 1 << max(length - 1, 0).bit_length()), most)


class PageScores:
    """Scores by our own kernel, a buffer of them for all layers and steps.

    Args:
        config: sizes.
        view: gives the start of the named buffer of a DeviceAttention as a tensor of a shape.
        num_logits: scores that the buffer holds.
        select_slots: as `topk.device.slot_selector` gives it.

    Attributes:
        is_captured: False: no captured graph refers to anything that `prepare` makes.
    """

    is_captured = False

    def __init__(
        self, config: DSABackendConfig, view: Any, num_logits: int, select_slots: Any
    ) -> None:
        self._select_slots = select_slots
        self._block_size = config.cache_layout.block_size
        self._max_keys = config.max_blocks_per_seq * self._block_size
        self._view, self._num_logits = view, num_logits

    def prepare(self, step: ForwardMeta) -> None:
        """Nothing: these scores need no schedule."""

    def select(self, step: ForwardMeta, q: Any, weights: Any, cache: Any, slots: Any) -> None:
        """Fill `slots` with the best keys of every token."""
        num_tokens = step.position_ids.shape[0]
        width = rounded_length(step.max_seqlen_k, 64, self._max_keys)
        rows = max(1, self._num_logits // width)
        tokens = step.position_ids, step.batch_id_per_token, step.block_tables
        for first in range(0, num_tokens, rows):
            logits = self._view("logits", min(rows, num_tokens - first), width)
            score_pages(
                q,
                weights,
                cache,
                *tokens,
                logits,
                block_size=self._block_size,
                first_token=first,
                max_seqlen_k=step.max_seqlen_k,
            )
            self._select_slots(
                logits,
                *tokens,
                slots,
                block_size=self._block_size,
                num_blocks=cache.shape[0],
                first_token=first,
            )


def padded_rows(num_rows: int) -> int:
    """A number of rows that DeepGEMM compiles a schedule for: few of them, 1 more in 1024."""
    if num_rows > _ROW_STEP:
        return -(-num_rows // _ROW_STEP) * _ROW_STEP
    return max(_LEAST_ROWS, 1 << max(num_rows - 1, 0).bit_length())


def rows_within(num_rows: int) -> int:
    """The largest such number that is not more, but at least the smallest of all."""
    if num_rows > _ROW_STEP:
        return num_rows // _ROW_STEP * _ROW_STEP
    return max(_LEAST_ROWS, 1 << max(num_rows.bit_length() - 1, 0))


def chunk_bounds(num_tokens: int, chunk_rows: int) -> list[tuple[int, int, int]]:
    """First token, number of tokens and padded rows of each chunk of a step.

    Args:
        chunk_rows: tokens of a chunk but the last; a result of `rows_within`.
    """
    firsts = range(0, num_tokens, chunk_rows)
    numbers = [min(chunk_rows, num_tokens - first) for first in firsts]
    return [(f, n, padded_rows(n)) for f, n in zip(firsts, numbers, strict=True)]


@dataclass(frozen=True)
class _Chunk:
    """Tokens that are scored together, and what of the buffers is theirs.

    Windows are the tokens' own; queries, weights, lengths and tables reach to a number of rows that
    a schedule is compiled for.
    """

    first: int
    num_tokens: int
    queries: Any
    weights: Any
    lengths: Any
    tables: Any
    starts: Any
    ends: Any
    schedule: Any


class DeepGemmScores:
    """Scores by DeepGEMM: prompts by their gathered keys, all other tokens in their pages.

    What depends on the step alone is made by `prepare`, in buffers that never move, so that a
    captured graph finds that of the step it is replayed in.

    Args:
        gemm: the package.
        config: sizes.
        allocate: as of a DeviceAttention.
        queries, weights: where queries and head weights of a step are read, `padded_rows` long.
        logits_bytes: most memory for scores; at least 32 tokens' are always held.

    Attributes:
        max_captured: tokens that a captured graph may have at most: their chunks are the same in
            every step.
    """

    def __init__(
        self,
        gemm: DeepGemm,
        config: DSABackendConfig,
        allocate: Allocate,
        queries: Any,
        weights: Any,
        logits_bytes: int,
    ) -> None:
        layout, tokens = config.cache_layout, padded_rows(config.max_num_tokens)
        self._gemm, self._block_size = gemm, layout.block_size
        self._max_width = _columns(config.max_blocks_per_seq * layout.block_size)
        self._num_logits = logits_bytes // 4
        self.max_captured = rows_within(self._num_logits // self._max_width)
        num_chunks = -(-config.max_num_tokens // self.max_captured)
        schedules = allocate((num_chunks, gemm.num_parts + 1, 2), "int32")
        self._schedules = [schedules[index] for index in range(num_chunks)]
        self._rows = TokenRows(
            allocate((tokens,), "int32"),
            allocate((tokens, config.max_blocks_per_seq), "int32"),
            *(allocate((tokens,), "int32") for _ in range(3)),
        )
        self._queries, self._weights, self._e4m3 = queries, weights, as_e4m3(queries)
        self._select_slots = slot_selector(allocate)
        self._max_gathered = gathered_keys(config) if gemm.reads_gathered else 0
        if self._max_gathered:
            self._codes = allocate((self._max_gathered, layout.index_head_dim), "uint8")
            self._scales = allocate((self._max_gathered,), "float32")
            self._keys = as_e4m3(self._codes), self._scales
        # rows that hold something: at first anything
        self._used_rows = tokens
        self._chunks = lru_cache(maxsize=512)(self._make_chunks)

    def compile(self, transfers: Transfers) -> None:
        """Make a schedule of every number of rows, so that no step waits for the compiler."""
        lengths, copied = self._rows.lengths, transfers.event()
        ones = np.ones(lengths.shape[0], np.int32)
        transfers.to_device(lengths, ones)
        copied.record()
        copied.wait()
        rows, most = 1, lengths.shape[0]
        while (padded := padded_rows(rows)) <= most:
            self._gemm.schedule(lengths[:padded])
            rows = padded + 1

    def prepare(self, step: ForwardMeta) -> None:
        """Make the rows and schedules of a step."""
        width = self._width(step)
        chunks = self._chunks_of(step, width)
        if not chunks:
            return
        used = chunks[-1].first + chunks[-1].lengths.shape[0]
        fill_token_rows(
            self._rows,
            step,
            block_size=self._block_size,
            num_rows=max(used, self._used_rows),
            max_length=width,
            max_gathered=self._max_gathered,
        )
        self._used_rows = used
        for chunk in chunks:
            copy_rows(self._gemm.schedule(chunk.lengths), chunk.schedule)

    def select(self, step: ForwardMeta, q: Any, weights: Any, cache: Any, slots: Any) -> None:
        """Fill `slots` with the best keys of every token of the step prepared last."""
        for given, buffer in ((q, self._queries), (weights, self._weights)):
            if given.data_ptr() != buffer.data_ptr():
                copy_rows(given, buffer)
        width = self._width(step)
        keys = self._gather(step, cache)
        groups = None if keys is None else self._rows.is_gathered[: slots.shape[0]]
        tokens = step.position_ids, step.batch_id_per_token, step.block_tables
        options = {"block_size": self._block_size, "num_blocks": cache.shape[0], "groups": groups}
        for chunk in self._chunks_of(step, width):
            # no name for the scores: those of one kind are gone before the others are made
            if keys is not None:
                self._select_slots(
                    self._score_gathered(chunk, *keys, width),
                    *tokens,
                    slots,
                    first_token=chunk.first,
                    group=1,
                    **options,
                )
            self._select_slots(
                self._score_pages(chunk, cache, width),
                *tokens,
                slots,
                first_token=chunk.first,
                group=0,
                **options,
            )

    def _gather(self, step: ForwardMeta, cache: Any) -> tuple[Any, Any] | None:
        """The keys of the step's prompts, for which there is room; None without a prompt."""
        if step.cu_seqlens_kg is None or not self._max_gathered:
            return None
        gather_indexer_keys(
            cache,
            step.block_tables,
            step.cu_seqlens_kg,
            step.seq_lens_encoder,
            self._codes,
            self._scales,
        )
        return self._keys

    def _score_gathered(self, chunk: _Chunk, keys: Any, scales: Any, width: int) -> Any:
        """Scores of a chunk's tokens against their gathered keys."""
        rows = slice(chunk.num_tokens)
        queries, weights = chunk.queries[rows], chunk.weights[rows]
        windows = chunk.starts, chunk.ends
        return self._gemm.score_gathered(queries, keys, scales, weights, *windows, width)

    def _score_pages(self, chunk: _Chunk, cache: Any, width: int) -> Any:
        """Scores of a chunk's tokens against the keys in their pages."""
        rows = chunk.weights, chunk.lengths, chunk.tables, chunk.schedule
        logits = self._gemm.score_pages(chunk.queries, cache, *rows, width)
        return logits[: chunk.num_tokens]

    def _width(self, step: ForwardMeta) -> int:
        """Columns of a step's scores."""
        return rounded_length(step.max_seqlen_k, SCORE_TILE, self._max_width)

    def _chunks_of(self, step: ForwardMeta, width: int) -> tuple[_Chunk, ...]:
        """The chunks of a step; those of a short step do not depend on its longest row."""
        num_tokens, rows = step.position_ids.shape[0], self.max_captured
        if num_tokens > rows:
            rows = rows_within(self._num_logits // width)
        return self._chunks(num_tokens, rows)

    def _make_chunks(self, num_tokens: int, chunk_rows: int) -> tuple[_Chunk, ...]:
        """That many tokens, cut after `chunk_rows` each."""
        found = []
        bounds = chunk_bounds(num_tokens, chunk_rows)
        for (first, number, rows), schedule in zip(bounds, self._schedules, strict=False):
            own, padded = slice(first, first + number), slice(first, first + rows)
            found.append(
                _Chunk(
                    first,
                    number,
                    self._e4m3[padded],
                    self._weights[padded],
                    self._rows.lengths[padded],
                    self._rows.tables[padded],
                    self._rows.starts[own],
                    self._rows.ends[own],
                    schedule,
                )
            )
        return tuple(found)


def _columns(num_keys: int) -> int:
    """Columns of scores for that many keys."""
    return -(-num_keys // SCORE_TILE) * SCORE_TILE


def gathered_keys(config: DSABackendConfig) -> int:
    """Keys of prompts that are gathered at most in a step."""
    longest = config.max_num_seqs * config.max_blocks_per_seq * config.cache_layout.block_size
    per_key = config.cache_layout.index_head_dim + 4
    return min(_columns(longest), _GATHERED_BYTES // per_key // SCORE_TILE * SCORE_TILE)


def deep_gemm_bytes(config: DSABackendConfig, logits_bytes: int) -> int:
    """Bytes that DeepGemmScores holds, and its scores while they last."""
    tokens = padded_rows(config.max_num_tokens)
    keys = gathered_keys(config) * (config.cache_layout.index_head_dim + 4)
    return logits_bytes + keys + 4 * tokens * (config.max_blocks_per_seq + 4)
