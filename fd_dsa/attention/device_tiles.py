"""How the tokens of a step on a device are scored on tensor cores, for fp8_ds_mla caches."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.device_logits import rounded_length
from fd_dsa.ops.logits.tile_forms import BLOCK_SIZE, decode_form, prompt_form, why_not
from fd_dsa.ops.logits.tile_kernel import score_tiles
from fd_dsa.ops.logits.tile_schedule import PROGRAM_FIELDS, TileSchedule
from fd_dsa.step import ForwardMeta
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.transfers import Transfers

# as of a DeviceAttention
_CACHED_VIEWS = 512


def reason_against(config: DSABackendConfig) -> str | None:
    """Why TileScores cannot serve a DSABackendConfig; None if it can."""
    layout = config.cache_layout
    return why_not(layout.kv_cache_dtype, layout.block_size, config.index_n_heads)


class TileScores:
    """Scores in a buffer for all layers and steps, like PageScores, with a schedule once a step.

    Two forms of the kernel serve: one for steps of decode rows alone, one for all others. A
    captured graph may be replayed in any step of as many tokens that is of the same kind, behind
    its `prepare`: captured scores are as wide as the longest row that there can be, and lengths
    are read on the device.

    Args:
        config: sizes.
        allocate: as of a DeviceAttention.
        view: gives the start of the named buffer of a DeviceAttention as a tensor of a shape.
        num_logits: scores that the buffer holds; at least one token's of the longest row.
        select_slots: as `topk.custom_op.slot_selector` gives it.
        transfers: what is known of the device and of its current stream.
        tokens_per_row: new tokens of most decode rows, drafts included.

    Attributes:
        max_whole: tokens whose scores are held at once, however long their rows are. Steps of
            more are cut into chunks by their longest row, unless one as long was captured.
        is_captured: a captured graph reads the schedule, so `prepare` must go before every replay.
    """

    def __init__(
        self,
        config: DSABackendConfig,
        allocate: Allocate,
        view: Any,
        num_logits: int,
        select_slots: Any,
        transfers: Transfers,
        tokens_per_row: int = 1,
    ) -> None:
        heads = config.index_n_heads
        forms = decode_form(heads, tokens_per_row), prompt_form(heads)
        self._max_width = config.max_blocks_per_seq * BLOCK_SIZE
        self._index_topk, self._num_logits = config.index_topk, num_logits
        self._select_slots, self._transfers = select_slots, transfers
        self._logits = lru_cache(maxsize=_CACHED_VIEWS)(partial(_logits, view))
        self.max_whole = num_logits // self._max_width
        self.is_captured = False
        # tokens of captured steps that are longer
        self._captured: set[int] = set()
        max_chunks = -(-config.max_num_tokens // self.max_whole)
        processors = transfers.num_processors()
        programs = [processors * form.programs_per_processor for form in forms]
        sizes = config.max_num_tokens, max_chunks, max(programs)
        most = TileSchedule.allocate(forms[0], *sizes, allocate)
        self._schedules = [
            replace(most, form=form, programs=_first_programs(most.programs, number))
            for form, number in zip(forms, programs, strict=True)
        ]

    def prepare(self, step: ForwardMeta) -> None:
        """Make the schedule of a step: one launch."""
        stride, rows = self._chunks(step)
        self._schedule_of(step).fill(step, stride, rows, self._index_topk)

    def select(self, step: ForwardMeta, q: Any, weights: Any, cache: Any, slots: Any) -> None:
        """Fill `slots` with the best keys of every token of the step prepared last."""
        schedule = self._schedule_of(step)
        num_tokens = step.position_ids.shape[0]
        stride, rows = self._chunks(step)
        capturing = self._transfers.is_capturing()
        self.is_captured |= capturing
        # a replay may have longer rows; without one, a choice among fewer columns is faster
        width = stride if capturing else self._width(step)
        for chunk, first in enumerate(range(0, num_tokens, rows)):
            logits = self._logits(min(rows, num_tokens - first), stride, width)
            where = {"first_token": first, "chunk": chunk}
            score_tiles(q, weights, cache, step, schedule, logits, **where)
            self._select_slots(
                logits,
                step.position_ids,
                step.batch_id_per_token,
                step.block_tables,
                slots,
                block_size=BLOCK_SIZE,
                num_blocks=cache.shape[0],
                first_token=first,
            )

    def _schedule_of(self, step: ForwardMeta) -> TileSchedule:
        """The one for steps with prompts, or without."""
        return self._schedules[step.num_prefill_tokens > 0]

    def _width(self, step: ForwardMeta) -> int:
        """Columns that a step's longest row needs."""
        return rounded_length(step.max_seqlen_k, BLOCK_SIZE, self._max_width)

    def _chunks(self, step: ForwardMeta) -> tuple[int, int]:
        """Distance between a step's rows of scores, and tokens of a chunk."""
        num_tokens = step.position_ids.shape[0]
        if num_tokens > self.max_whole and self._transfers.is_capturing():
            # the graph's chunks are those of all its replays
            self._captured.add(num_tokens)
        if num_tokens <= self.max_whole or num_tokens in self._captured:
            return self._max_width, self.max_whole
        width = self._width(step)
        return width, self._num_logits // width


def _logits(view: Any, num_rows: int, stride: int, width: int) -> Any:
    """Rows of `width` scores at a distance of `stride`."""
    logits = view("logits", num_rows, stride)
    return logits if width == stride else logits[:, :width]


def _first_programs(programs: Any, num_programs: int) -> Any:
    """The same memory for fewer programs a chunk."""
    num_chunks = programs.shape[0]
    flat = programs.reshape([-1])[: num_chunks * num_programs * PROGRAM_FIELDS]
    return flat.reshape([num_chunks, num_programs, PROGRAM_FIELDS])


def tile_bytes(config: DSABackendConfig, num_logits: int, num_processors: int) -> int:
    """Bytes that a TileScores allocates."""
    forms = decode_form(config.index_n_heads, 1), prompt_form(config.index_n_heads)
    programs = num_processors * max(form.programs_per_processor for form in forms)
    max_whole = num_logits // (config.max_blocks_per_seq * BLOCK_SIZE)
    max_chunks = -(-config.max_num_tokens // max_whole)
    return 4 * (5 * config.max_num_tokens + max_chunks * programs * PROGRAM_FIELDS)
