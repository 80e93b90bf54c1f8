"""How the scores of a step are shared out to programs: made once a step, the same in every layer.

A *query tile* is a few consecutive tokens of one request, whose queries stay in place while the
request's pages go by. Every program gets the same number of pages, give or take one, whatever the
lengths of the requests are, and takes them in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fd_dsa.ops._triton import step_kernel
from fd_dsa.ops.logits.tile_forms import BLOCK_SIZE, TileForm
from fd_dsa.step import ForwardMeta
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton.language as tl  # isort: skip

# tokens, and programs, that a program of the schedule's kernel takes at a time
_LANES, _NUM_WARPS = tl.constexpr(1024), 8
_PAGE = tl.constexpr(BLOCK_SIZE)
TILE_FIELDS, PROGRAM_FIELDS = 4, 8


@step_kernel(waits=True)
def tile_schedule_kernel(
    position_ids_ptr,
    batch_id_per_token_ptr,
    cu_seqlens_q_ptr,
    tiles_ptr,
    page_ends_ptr,
    programs_ptr,
    num_tokens,
    chunk_tokens,
    max_keys,
    least_keys,
    num_programs,
    tile_tokens,
    search_steps,
):
    """The tiles of chunk `program 0`, and where each of its programs begins."""
    wait_for_inputs()
    start_next()
    first = tl.program_id(0) * chunk_tokens
    end = tl.minimum(first + chunk_tokens, num_tokens)
    lane = tl.arange(0, _LANES)
    num_tiles, num_pages = 0, 0
    for start in range(first, end, _LANES):
        token = start + lane
        inside = token < end
        request = tl.load(batch_id_per_token_ptr + token, mask=inside, other=-1)
        live = inside & (request >= 0)
        begin = tl.load(cu_seqlens_q_ptr + request, mask=live, other=0)
        stop = tl.load(cu_seqlens_q_ptr + request + 1, mask=live, other=0)
        index = token - tl.maximum(begin, first)
        is_first = live & (index >= 0) & (index % tile_tokens == 0)
        count = tl.minimum(tl.minimum(stop, end) - token, tile_tokens)
        is_first = is_first & (count > 0)
        # the last token of a tile sees most
        position = tl.load(position_ids_ptr + token + count - 1, mask=is_first, other=-1)
        keys = tl.minimum(position + 1, max_keys).to(tl.int32)
        scored = is_first & (keys > least_keys)
        pages = tl.where(scored, (keys + _PAGE - 1) // _PAGE, 0)
        tile = first + num_tiles + tl.cumsum(scored.to(tl.int32)) - 1
        entry = tiles_ptr + tile * 4
        tl.store(entry, token, mask=scored)
        tl.store(entry + 1, count, mask=scored)
        tl.store(entry + 2, request, mask=scored)
        tl.store(entry + 3, pages, mask=scored)
        tl.store(page_ends_ptr + tile, num_pages + tl.cumsum(pages), mask=scored)
        num_tiles += tl.sum(scored.to(tl.int32))
        num_pages += tl.sum(pages)
    # what other threads wrote is read below
    tl.debug_barrier()
    for start in range(0, num_programs, _LANES):
        program = start + lane
        exists = program < num_programs
        # the first programs, which are on processors of their own, have one more
        begin = program * (num_pages // num_programs)
        begin += tl.minimum(program, num_pages % num_programs)
        count = num_pages // num_programs + (program < num_pages % num_programs).to(tl.int32)
        # tiles that end at or before the program's first page
        low = lane * 0
        high = low + num_tiles
        for _ in range(search_steps):
            middle = (low + high) // 2
            open_ = exists & (low < high)
            page_end = tl.load(page_ends_ptr + first + middle, mask=open_, other=0)
            low = tl.where(open_ & (page_end <= begin), middle + 1, low)
            high = tl.where(open_ & (page_end > begin), middle, high)
        before = tl.load(page_ends_ptr + first + low - 1, mask=exists & (low > 0), other=0)
        entry = programs_ptr + (tl.program_id(0) * num_programs + program) * 8
        tl.store(entry, first + low, mask=exists)
        tl.store(entry + 1, begin - before, mask=exists)
        tl.store(entry + 2, count, mask=exists)
        tile = tiles_ptr + (first + low) * 4
        for field in tl.static_range(4):
            value = tl.load(tile + field, mask=exists & (low < num_tiles), other=0)
            tl.store(entry + 4 + field, value, mask=exists)


@dataclass(frozen=True)
class TileSchedule:
    """Tiles of the chunks of a step, in buffers that never move.

    The tiles of the chunk that begins at token t begin at entry t: none has more tiles than tokens.

    Attributes:
        form: of the kernel that scores.
        tiles: int32 [max_num_tokens, 4]; first token, number of tokens, request and number of pages
            of each tile that is scored.
        page_ends: int32 [max_num_tokens]; pages of a chunk's tiles up to and with this one.
        programs: int32 [max_num_chunks, num_programs, 8]; the entry of a program's first tile, its
            first page there, how many pages are its own, nothing, then that entry itself: what a
            program must know first it reads at once.
    """

    form: TileForm
    tiles: Any
    page_ends: Any
    programs: Any

    @classmethod
    def allocate(
        cls, form: TileForm, max_tokens: int, max_chunks: int, num_programs: int, allocate: Any
    ) -> TileSchedule:
        """Buffers for steps of at most so many tokens, made by `(shape, dtype name) -> tensor`."""
        return cls(
            form,
            allocate((max_tokens, TILE_FIELDS), "int32"),
            allocate((max_tokens,), "int32"),
            allocate((max_chunks, num_programs, PROGRAM_FIELDS), "int32"),
        )

    def fill(
        self,
        step: ForwardMeta,
        max_keys: int,
        chunk_tokens: int | None = None,
        least_keys: int = 0,
    ) -> None:
        """Share out the scores of a step's tokens, in chunks that are scored in order.

        Args:
            step: whose tokens are scored; padding is in no tile.
            max_keys: most keys that are looked at of a request; the width of its scores.
            chunk_tokens: tokens of a chunk, but the last; None = all are one chunk.
            least_keys: a tile none of whose tokens sees more keys is not scored: index_topk, if the
                selection then takes all keys without a look at their scores.

        Cost: one launch; no allocation, no wait. Lengths are read when the kernel runs: captured
        into a graph, or ahead of one, it serves any lengths of that many tokens.
        """
        num_tokens = step.position_ids.shape[0]
        if num_tokens == 0:
            return
        chunk_tokens = chunk_tokens or num_tokens
        search_steps = min(chunk_tokens, num_tokens).bit_length()
        tile_schedule_kernel[(-(-num_tokens // chunk_tokens),)](
            *(step.position_ids, step.batch_id_per_token, step.cu_seqlens_q),
            *(self.tiles, self.page_ends, self.programs),
            *(num_tokens, chunk_tokens, max_keys, least_keys),
            *(self.programs.shape[1], self.form.tile_tokens, search_steps),
            num_warps=_NUM_WARPS,
        )
