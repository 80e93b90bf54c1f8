"""Distribution of the scores of a step over programs, made once a step for all layers.

A *query tile* is a few consecutive tokens of one request. A program keeps their queries while it
loads the request's pages. Every program gets the same share of the work in one piece, for all
lengths of requests. A page is a unit of work, and the start of a tile costs a few units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fd_dsa.device.allocation import Allocate
from fd_dsa.ops.device_functions import key_bounds
from fd_dsa.ops.key_bounds import prompt_windows
from fd_dsa.ops.logits.tile_configs import PAGE, TileConfig
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.step import ForwardMeta
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# tokens or programs that the schedule's kernel handles at a time
_LANES, _NUM_WARPS = tl.constexpr(1024), 8
_PAGE = tl.constexpr(PAGE)
TILE_FIELDS, PROGRAM_FIELDS = 4, 8


@triton.jit
def _place(work_ends_ptr, num_tiles, work, exists, begin_pages, search_steps):
    """Return for amounts of work the tile where each ends, its page there, and pages so far."""
    low = tl.zeros_like(work)
    high = low + num_tiles
    # binary search for the number of tiles that end at `work` or before
    for _ in range(search_steps):
        middle = (low + high) // 2
        open_ = exists & (low < high)
        end = tl.load(work_ends_ptr + middle, mask=open_, other=0)
        low = tl.where(open_ & (end <= work), middle + 1, low)
        high = tl.where(open_ & (end > work), middle, high)
    before = tl.load(work_ends_ptr + low - 1, mask=exists & (low > 0), other=0)
    page = tl.maximum(work - before - begin_pages, 0)
    return low, page, before - low * begin_pages + page


@step_kernel(waits=True)
def tile_schedule_kernel(
    position_ids_ptr,
    batch_id_per_token_ptr,
    cu_seqlens_q_ptr,
    offsets_ptr,
    key_starts_ptr,
    seq_lens_encoder_ptr,
    tiles_ptr,
    work_ends_ptr,
    programs_ptr,
    first_token,
    end_token,
    chunk_tokens,
    max_keys,
    min_keys,
    num_programs,
    tile_tokens,
    begin_pages,
    search_steps,
):
    """Make the tiles of chunk `program 0`, and the start of each of its programs."""
    wait_for_inputs()
    start_next()
    first = first_token + tl.program_id(0) * chunk_tokens
    end = tl.minimum(first + chunk_tokens, end_token)
    lane = tl.arange(0, _LANES)
    num_tiles, all_work = 0, 0
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
        # without windows the last token of a tile has the most keys
        _, keys = key_bounds(
            token + count - 1, request, is_first, position_ids_ptr,
            offsets_ptr, key_starts_ptr, seq_lens_encoder_ptr,
        )  # fmt: skip
        if offsets_ptr is not None:
            for other in range(tile_tokens - 1):
                _, end_of_keys = key_bounds(
                    token + other, request, is_first & (other < count - 1), position_ids_ptr,
                    offsets_ptr, key_starts_ptr, seq_lens_encoder_ptr,
                )  # fmt: skip
                keys = tl.maximum(keys, end_of_keys)
        keys = tl.minimum(keys, max_keys)
        scored = is_first & (keys > min_keys)
        pages = tl.where(scored, (keys + _PAGE - 1) // _PAGE, 0)
        tile = first + num_tiles + tl.cumsum(scored.to(tl.int32)) - 1
        entry = tiles_ptr + tile * 4
        tl.store(entry, token, mask=scored)
        tl.store(entry + 1, count, mask=scored)
        tl.store(entry + 2, request, mask=scored)
        tl.store(entry + 3, pages, mask=scored)
        work = tl.where(scored, pages + begin_pages, 0)
        tl.store(work_ends_ptr + tile, all_work + tl.cumsum(work), mask=scored)
        num_tiles += tl.sum(scored.to(tl.int32))
        all_work += tl.sum(work)
    # values of other threads are read below
    tl.debug_barrier()
    for start in range(0, num_programs, _LANES):
        program = start + lane
        exists = program < num_programs
        # the first programs start on idle processors, so they get one unit more
        share, more = all_work // num_programs, all_work % num_programs
        own_begin = program * share + tl.minimum(program, more)
        own_end = own_begin + share + (program < more).to(tl.int32)
        # both searches share a loop, because each step waits for memory
        tile_of, page_of, done = _place(
            work_ends_ptr + first, num_tiles, tl.join(own_begin, own_end), exists[:, None],
            begin_pages, search_steps,
        )  # fmt: skip
        own_tile, _ = tl.split(tile_of)
        own_page, _ = tl.split(page_of)
        before, after = tl.split(done)
        entry = programs_ptr + (tl.program_id(0) * num_programs + program) * 8
        tl.store(entry, first + own_tile, mask=exists)
        tl.store(entry + 1, own_page, mask=exists)
        tl.store(entry + 2, after - before, mask=exists)
        for field in tl.static_range(4):
            held = exists & (own_tile < num_tiles)
            value = tl.load(tiles_ptr + (first + own_tile) * 4 + field, mask=held, other=0)
            tl.store(entry + 4 + field, value, mask=exists)


@dataclass(frozen=True)
class TileSchedule:
    """Tiles of the chunks of a step, in buffers that never move.

    A chunk has at most as many tiles as tokens. So the tiles of the chunk that begins at token t
    begin at entry t.

    Attributes:
        config: configuration of the kernel that scores.
        tiles: int32 [max_num_tokens, 4]; first token, number of tokens, request and number of pages
            of each tile that is scored.
        work_ends: int32 [max_num_tokens]; the work of a chunk's tiles up to and with this one.
        programs: int32 [max_num_chunks, num_programs, 8]; index of a program's first tile, first
            page there, number of pages, an unused value, and the entry of the tile. A program loads
            all of it at once.
    """

    config: TileConfig
    tiles: Any
    work_ends: Any
    programs: Any

    @classmethod
    def allocate(
        cls,
        config: TileConfig,
        max_tokens: int,
        max_chunks: int,
        num_programs: int,
        allocate: Allocate,
    ) -> TileSchedule:
        """Allocate buffers for steps of at most `max_tokens` tokens in `max_chunks` chunks."""
        return cls(
            config,
            allocate((max_tokens, TILE_FIELDS), "int32"),
            allocate((max_tokens,), "int32"),
            allocate((max_chunks, num_programs, PROGRAM_FIELDS), "int32"),
        )

    def fill(
        self,
        step: ForwardMeta,
        max_keys: int,
        chunk_tokens: int | None = None,
        min_keys: int = 0,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Distribute the scores of a step's tokens, in chunks that are scored in order.

        Args:
            step: step whose tokens are scored. Padding belongs to no tile.
            max_keys: maximum number of keys of a request that are scored, the width of its scores.
            chunk_tokens: number of tokens of a chunk except the last. None = one chunk.
            min_keys: a tile is scored only if a token of it has more keys. Set it to index_topk if
                the selection then takes all keys without their scores.
            part: first token that is scored, and the end of those tokens. None = all tokens.

        Cost: one launch. The kernel reads lengths when it runs, so a captured launch serves all
        lengths of that number of tokens.
        """
        first, end = part or (0, step.position_ids.shape[0])
        num_tokens = end - first
        if num_tokens == 0:
            return
        chunk_tokens = chunk_tokens or num_tokens
        search_steps = min(chunk_tokens, num_tokens).bit_length()
        tile_schedule_kernel[(-(-num_tokens // chunk_tokens),)](
            *(step.position_ids, step.batch_id_per_token, step.cu_seqlens_q),
            *prompt_windows(step),
            *(self.tiles, self.work_ends, self.programs),
            *(first, end, chunk_tokens, max_keys, min_keys),
            *(
                self.programs.shape[1],
                self.config.tile_tokens,
                self.config.begin_pages,
                search_steps,
            ),
            num_warps=_NUM_WARPS,
        )
