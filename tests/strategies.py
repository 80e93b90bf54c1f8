"""Hypothesis strategies: steps with every kind of row, over disjoint cache blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ROW_KINDS = ("idle", "first_chunk", "later_chunk", "decode", "mtp_decode", "idle_with_cache")
BLOCK_SIZES = (1, 16, 64)


def examples(many: int, in_soak: int) -> settings:
    """Settings of a test with `many` random cases, `in_soak` of them in `make soak`.

    Under a memory checker the number is that of its profile. A fixture of one function holds no
    state that one case could leave to the next.
    """
    profile = settings.default.max_examples
    return settings(
        # 100 is that of the quick suite
        max_examples=min(many, profile) if profile < 100 else many if profile == 100 else in_soak,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@dataclass(frozen=True)
class StepBatch:
    """One step's inputs and the sizes of a builder that they fit.

    `seq_lens_*` are int32 [B], `block_tables` int32 [B, max_blocks]; entries that no token needs
    are -1 or, as schedulers allocate ahead, any block id.
    """

    seq_lens_encoder: np.ndarray
    seq_lens_decoder: np.ndarray
    seq_lens_this_time: np.ndarray
    block_tables: np.ndarray
    block_size: int
    num_blocks: int
    num_padded_tokens: int | None

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens_this_time)

    @property
    def num_tokens(self) -> int:
        return int(self.seq_lens_this_time.sum())

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The four arrays in the order of `StepMetadataBuilder.build`."""
        return (
            self.seq_lens_encoder,
            self.seq_lens_decoder,
            self.seq_lens_this_time,
            self.block_tables,
        )


def _lengths(kind: str, new: int, cached: int) -> tuple[int, int, int]:
    """Encoder, decoder and this-time length of a row of the given kind."""
    return {
        "idle": (0, 0, 0),
        "idle_with_cache": (0, cached, 0),
        "first_chunk": (new, 0, new),
        "later_chunk": (new, cached, new),
        "decode": (0, cached, 1),
        "mtp_decode": (0, cached, min(new, 4)),
    }[kind]


def make_batch(
    rows: list[tuple[int, int, int]],
    block_size: int,
    seed: int = 0,
    spare_columns: int = 0,
    num_padded_tokens: int | None = None,
    num_columns: int | None = None,
) -> StepBatch:
    """A step of `(encoder, decoder, this_time)` rows over shuffled, disjoint blocks."""
    rng = np.random.default_rng(seed)
    lengths = np.array(rows, np.int32).reshape(-1, 3)
    needed = -(-(lengths[:, 1] + lengths[:, 2]) // block_size)
    columns = num_columns or max(1, int(needed.max(initial=0)) + spare_columns)
    num_blocks = int(needed.sum()) + 3
    free = rng.permutation(num_blocks).astype(np.int32)
    # what lies past a row's length is junk, some of it no block at all
    tables = rng.integers(-1, num_blocks, (len(rows), columns), np.int32)
    for row, count in enumerate(needed):
        tables[row, :count], free = free[:count], free[count:]
        if rng.integers(2):
            tables[row, count:] = -1
    encoder, decoder, this_time = np.ascontiguousarray(lengths.T)
    return StepBatch(encoder, decoder, this_time, tables, block_size, num_blocks, num_padded_tokens)


@cache
def _rows(
    kinds: tuple[str, ...], min_rows: int, max_rows: int, max_len: int
) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """Lengths of the rows of a step; a strategy is made once, since Hypothesis checks each."""
    edges = [n for k in (1, 2) for n in (k * 64 - 1, k * 64, k * 64 + 1) if n <= max_len]
    lengths = st.one_of(st.integers(1, 5), st.sampled_from([1, *edges]), st.integers(1, max_len))
    row = st.builds(_lengths, st.sampled_from(kinds), lengths, lengths)
    return st.lists(row, min_size=min_rows, max_size=max_rows)


_BLOCK_SIZE = st.sampled_from(BLOCK_SIZES)
_PADDING = st.one_of(st.none(), st.integers(0, 9))
_SEED = st.integers(0, 2**32 - 1)
_SPARE_COLUMNS = st.integers(0, 2)


@st.composite
def step_batches(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = ROW_KINDS,
    min_rows: int = 0,
    max_rows: int = 8,
    max_len: int = 200,
    block_size: int | None = None,
    num_columns: int | None = None,
) -> StepBatch:
    """Any legal step: all kinds of rows in any order, block edges, padding or none."""
    block_size = block_size or draw(_BLOCK_SIZE)
    rows = draw(_rows(kinds, min_rows, max_rows, max_len))
    num_tokens = sum(new for _, _, new in rows)
    padding = draw(_PADDING)
    return make_batch(
        rows,
        block_size,
        seed=draw(_SEED),
        spare_columns=draw(_SPARE_COLUMNS),
        num_padded_tokens=None if padding is None else num_tokens + padding,
        num_columns=num_columns,
    )


@st.composite
def step_sequences(draw: st.DrawFn, max_rows: int = 8, max_len: int = 80) -> list[StepBatch]:
    """Several steps of different sizes that fit one builder."""
    return draw(_sequences(draw(_BLOCK_SIZE), max_rows, max_len))


@cache
def _sequences(block_size: int, max_rows: int, max_len: int) -> st.SearchStrategy[list[StepBatch]]:
    """As `step_sequences`, of one block size."""
    columns = -(-2 * max_len // block_size)
    batch = step_batches(
        max_rows=max_rows, max_len=max_len, block_size=block_size, num_columns=columns
    )
    return st.lists(batch, min_size=2, max_size=6)


def chunk_lengths(total: int) -> st.SearchStrategy[list[int]]:
    """Ways to cut `total` tokens into chunks of at least one."""
    cuts = st.sets(st.integers(1, total - 1), max_size=4) if total > 1 else st.just(set())
    return cuts.map(lambda found: np.diff([0, *sorted(found), total]).tolist())
