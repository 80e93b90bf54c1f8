"""Values of the FP8 records of prompts, for many tokens that read the same keys.

A token of a prompt reads hundreds of keys of DeepSeek-V4, and its neighbours read mostly the same
ones. A kernel that converts codes for each token repeats the work. Here records become rows of
bfloat16 once a layer, without a loss. The device decides once a step for which rows of the batch
this pays, and whose entries fit the memory.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

from fd_dsa.device.allocation import Allocate
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.v4_attend_cuda import kernel_for
from fd_dsa.ops.v4_places import Entries, PlainKeys, Windows
from fd_dsa.ops.v4_records import load_records
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

logger = logging.getLogger(__name__)
LEAST_TOKENS = 512
"""Least number of tokens, with padding, of a step with prompts whose records become rows first.

It is an estimate. With fewer tokens the two launches cost more than they save.
"""
_ENTRIES_PER_TOKEN = 16
"""Maximum number of entries of a row for each of its new tokens, an estimate."""
COLUMNS = 128
"""Entries of a table that a program writes at a time."""
MAX_ROWS = 1024
"""Maximum number of rows that a program sums at a time."""
# programs of a row
_MAX_PARTS = 16
# 4 programs for each processor of an H200, records that one converts at a time, and its warps
_PROGRAMS, _RECORDS, _NUM_WARPS = 528, 16, 8


@triton.jit
def _blocks_if_plain(
    before_ptr, new_ptr, rows, num_rows, most_blocks, MOST_DRAFTS: tl.constexpr,
    ENTRIES_PER_TOKEN: tl.constexpr, BLOCK_SIZE: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Return the tokens of rows, which of them are worth it, and the blocks of those rows."""
    new = tl.load(new_ptr + rows, mask=rows < num_rows, other=0)
    length = tl.load(before_ptr + rows, mask=rows < num_rows, other=0) + new
    entries = length // RATIO
    blocks = (entries * RATIO + BLOCK_SIZE - 1) // BLOCK_SIZE
    worth = (new > MOST_DRAFTS + 1) & (entries <= ENTRIES_PER_TOKEN * new) & (blocks <= most_blocks)
    return length, worth, tl.where(worth, blocks, 0)


@step_kernel()
def place_plain_kernel(
    before_ptr,
    new_ptr,
    block_table_ptr,
    is_plain_ptr,
    plain_table_ptr,
    blocks_ptr,
    total_ptr,
    num_rows,
    columns,
    num_blocks,
    capacity,
    MOST_DRAFTS: tl.constexpr,
    ENTRIES_PER_TOKEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RATIO: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the places of row `program 0`, see `PlainPlaces`. Grid: (rows, parts of a row)."""
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    most_blocks = tl.minimum(capacity, columns)
    begin, total, seen = 0, 0, 0
    for first in range(0, num_rows, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        _, _, blocks = _blocks_if_plain(
            before_ptr, new_ptr, rows, num_rows, most_blocks,
            MOST_DRAFTS, ENTRIES_PER_TOKEN, BLOCK_SIZE, RATIO,
        )  # fmt: skip
        ends = seen + tl.cumsum(blocks)
        total = tl.maximum(total, tl.max(tl.where(ends <= capacity, ends, 0)))
        begin += tl.sum(tl.where(rows < row, blocks, 0))
        seen += tl.sum(blocks)
    # a vector, because Triton's interpreter supports no mask of a scalar and a block
    own = row + tl.arange(0, 1)
    length, worth, blocks = _blocks_if_plain(
        before_ptr, new_ptr, own, num_rows, most_blocks,
        MOST_DRAFTS, ENTRIES_PER_TOKEN, BLOCK_SIZE, RATIO,
    )  # fmt: skip
    new = tl.load(new_ptr + own)
    is_plain = worth & (begin + blocks <= capacity)
    if part == 0:
        tl.store(is_plain_ptr + own, tl.where(is_plain, length - new + 1, 0))
        if row == 0:
            tl.store(total_ptr, total)
    # rows without tokens have no readers
    used = tl.where(new > 0, tl.minimum((length + BLOCK_SIZE - 1) // BLOCK_SIZE, columns), 0)
    used = tl.sum(used)
    first_cell = row.to(tl.int64) * columns
    for first in range(part * TILE, used, parts * TILE):
        column = first + tl.arange(0, TILE)
        inside, has_entries = column < used, is_plain & (column < blocks)
        block = tl.load(block_table_ptr + first_cell + column, mask=inside, other=-1)
        block = tl.where((block >= 0) & (block < num_blocks), block, -1)
        place = begin + column
        number = tl.where(has_entries, place, tl.where(is_plain, -1, block))
        number = tl.where(block < 0, -1, number)
        tl.store(plain_table_ptr + first_cell + column, number, mask=inside)
        cells = blocks_ptr + 2 * place
        written = inside & has_entries
        tl.store(cells, block, mask=written)
        tl.store(cells + 1, tl.minimum(length - column * BLOCK_SIZE, BLOCK_SIZE), mask=written)


@step_kernel()
def fill_plain_kernel(
    keys_ptr,
    ring_ptr,
    pool_ptr,
    rows_ptr,
    is_plain_ptr,
    blocks_ptr,
    total_ptr,
    memory_ptr,
    num_tokens,
    num_rows,
    first_ring,
    first_entry,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Convert every `num_programs`th tile of the records of plain rows, see `PlainRows.fill`.

    The memory has rows for the step's keys, for the rings from `first_ring` on, and for blocks of
    entries from `first_entry` on. A record has ROW bytes.
    """
    # offsets from one pointer in units that divide every address, as in `attend_v4_kernel`
    unit: tl.constexpr = min(16, ROW & -ROW)
    ring_units = (ring_ptr.to(tl.int64) - keys_ptr.to(tl.int64)) // unit
    end = first_entry
    if pool_ptr is not None:
        end += tl.load(total_ptr) * PER_BLOCK
    out_ptr = memory_ptr.to(tl.pointer_type(tl.bfloat16))
    for first in range(tl.program_id(0) * TILE, end, tl.num_programs(0) * TILE):
        place = first + tl.arange(0, TILE)
        wide, in_ring = place.to(tl.int64), place - first_ring
        is_key = place < num_tokens
        is_ring = (in_ring >= 0) & (place < first_entry) & (in_ring < num_rows * RING)
        row = tl.load(rows_ptr + place, mask=is_key, other=-1)
        row = tl.where(is_ring, in_ring // RING, row)
        plain = tl.load(is_plain_ptr + row, mask=row >= 0, other=0)
        # keys between this one and the step
        newer = (plain - 2 - in_ring % RING + RING) % RING
        in_window = (newer < WINDOW - 1) & (newer <= plain - 2)
        seen = (plain > 0) & (is_key | in_window)
        in_ring_units = ring_units + in_ring.to(tl.int64) * (ROW // unit)
        units = tl.where(is_ring, in_ring_units, wide * (ROW // unit))
        if pool_ptr is not None:
            entry = place - first_entry
            is_entry = (entry >= 0) & (place < end)
            cells, inside = blocks_ptr + entry // PER_BLOCK * 2, entry % PER_BLOCK
            block = tl.load(cells, mask=is_entry, other=-1)
            tokens = tl.load(cells + 1, mask=is_entry, other=0)
            seen |= (block >= 0) & (inside < tokens // RATIO)
            in_pool = block.to(tl.int64) * PER_BLOCK + inside
            pool_units = (pool_ptr.to(tl.int64) - keys_ptr.to(tl.int64)) // unit
            units = tl.where(is_entry, pool_units + in_pool * (ROW // unit), units)
        if tl.max(seen.to(tl.int32)) > 0:
            to = out_ptr + wide[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            values = load_records(keys_ptr + units * unit, seen, WIDTH, ROPE)
            tl.store(to, values, mask=seen[:, None])


class PlainPlaces(NamedTuple):
    """Places of the entries of a step's plain rows, int32.

    Attributes:
        is_plain: [max_rows], tokens before the step plus 1 for a plain row, else 0.
        block_table: [max_rows, columns], blocks of each row, -1 = not in the pool. Blocks of plain
            rows are plain blocks. Columns after the last token of a row are not written.
        blocks: [capacity, 2], block of the pool that each plain block holds, and its tokens.
        total: [1], number of plain blocks.
        capacity: maximum number of plain blocks.
    """

    is_plain: Tensor
    block_table: Tensor
    blocks: Tensor
    total: Tensor
    capacity: int


@dataclass(frozen=True, slots=True)
class PlainSizes:
    """Sizes of the largest step and of its records.

    Attributes:
        max_tokens, max_rows, columns: tokens of a step, rows of the batch, blocks of a row.
        max_drafts: maximum number of drafts of a row. A row with more new tokens is of a prompt.
        window, ring_rows: keys that a token sees, and keys of a row's ring.
        block_size, ratio: tokens of a block, and of an entry of the kind with most entries.
        width, rope: values of a key, and those that are rotated.
    """

    max_tokens: int
    max_rows: int
    columns: int
    max_drafts: int
    window: int
    ring_rows: int
    block_size: int
    ratio: int
    width: int
    rope: int

    @property
    def first_entry(self) -> int:
        """Rows of the memory before those of entries."""
        return self.max_tokens + self.max_rows * self.ring_rows

    @property
    def least_words(self) -> int:
        """Least memory, float32 words: it holds the longest row, and prompts without a prefix."""
        blocks = self.columns + -(-self.max_tokens // self.block_size)
        return (self.first_entry + blocks * self._per_block) * self.width // 2

    @property
    def _per_block(self) -> int:
        return self.block_size // self.ratio

    def capacity(self, num_words: int) -> int:
        """Return the blocks whose entries fit a memory of float32 words and may be needed."""
        room = (2 * num_words // self.width - self.first_entry) // self._per_block
        # of each row a block may hold a single entry
        needed = -(-_ENTRIES_PER_TOKEN * self.max_tokens // self._per_block) + self.max_rows
        return max(0, min(room, needed))

    def arrays(self, capacity: int) -> list[tuple[int, ...]]:
        """Return the shapes of the arrays of a PlainPlaces, int32."""
        return [(self.max_rows,), (self.max_rows, self.columns), (capacity, 2), (1,)]


class PlainRows:
    """Memory for the values of records that a step's prompts read.

    Args:
        sizes: bounds of all steps.
        memory: contiguous float32 [`sizes.least_words` or more] on the device. It must not be used
            otherwise between `fill` and the launch that reads the result.
        allocate: allocates the arrays of a step.
    """

    def __init__(self, sizes: PlainSizes, memory: Tensor, allocate: Allocate) -> None:
        self._sizes, self._memory = sizes, memory
        capacity = sizes.capacity(memory.shape[0])
        is_plain, table, blocks, total = (allocate(x, "int32") for x in sizes.arrays(capacity))
        self._places = PlainPlaces(is_plain, table, blocks, total, capacity)
        ends = sizes.max_tokens, sizes.first_entry
        rings, entries = (memory[end * sizes.width // 2 :] for end in ends)
        self._keys = PlainKeys(memory, rings, entries, is_plain, table, 0)
        self._row_tile = min(next_power_of_2(sizes.max_rows), MAX_ROWS)
        form = f"become rows of values first, in steps of {LEAST_TOKENS} tokens and more"
        if kernel_for(memory) is None:
            form = "are converted for each token, because Triton's kernel attends"
        logger.info("records that prompts of DeepSeek-V4 read %s", form)

    @staticmethod
    def serves(tensor: Tensor, num_tokens: int) -> bool:
        """Return True if the records of a step's prompts should become rows first.

        Args:
            tensor: on the device.
            num_tokens: tokens of the step with padding, 0 for a step without prompts.
        """
        return num_tokens >= LEAST_TOKENS and kernel_for(tensor) is not None

    def place(
        self, before: Tensor, new: Tensor, block_table: Tensor, num_blocks: int
    ) -> PlainPlaces:
        """Decide which rows of a step are plain, and number their blocks, by one launch.

        A plain row has more new tokens than a row with drafts, and at most 16 entries for each of
        them. Such rows get memory for their blocks in order. After the first one whose blocks do
        not fit, no row is plain.

        Args:
            before, new: int32 [num_rows], tokens of each row before the step and in it.
            block_table: int32 [num_rows, columns], blocks of each row.
            num_blocks: blocks of a pool.

        Returns:
            Arrays that are valid until the next call, at addresses that never move.
        """
        sizes, places, (num_rows, columns) = self._sizes, self._places, block_table.shape
        place_plain_kernel[num_rows, min(-(-columns // COLUMNS), _MAX_PARTS)](
            before, new, block_table, *places[:4],
            num_rows, columns, num_blocks, places.capacity,
            MOST_DRAFTS=sizes.max_drafts, ENTRIES_PER_TOKEN=_ENTRIES_PER_TOKEN,
            BLOCK_SIZE=sizes.block_size, RATIO=sizes.ratio,
            ROW_TILE=self._row_tile, TILE=COLUMNS, num_warps=4,
        )  # fmt: skip
        return places

    def fill(
        self, windows: Windows, entries: Entries | None, rows: Tensor, num_rows: int
    ) -> PlainKeys:
        """Convert the records of a layer that tokens of plain rows may read, by one launch.

        The values of a record are exact in bfloat16.

        Args:
            windows, entries: of the layer, as records.
            rows: int32 [num_tokens or more], row of each token, -1 = padding.
            num_rows: rows of the step.

        Returns:
            Views of the memory, valid until the next call.
        """
        sizes, places = self._sizes, self._places
        pool, ratio, _ = entries or (None, sizes.ratio, None)
        per_block = sizes.block_size // ratio
        most = sizes.first_entry + places.capacity * per_block
        fill_plain_kernel[(min(_PROGRAMS, -(-most // _RECORDS)),)](
            windows.keys, windows.ring, pool, rows, places.is_plain, places.blocks, places.total,
            self._memory, windows.keys.shape[0], num_rows, sizes.max_tokens, sizes.first_entry,
            RING=windows.ring_rows, WINDOW=windows.size, RATIO=ratio, PER_BLOCK=per_block,
            ROW=windows.keys.shape[1], WIDTH=sizes.width, ROPE=sizes.rope,
            TILE=_RECORDS, num_warps=_NUM_WARPS,
        )  # fmt: skip
        num_slots = 0 if pool is None else places.capacity * per_block
        return self._keys._replace(num_slots=num_slots)
