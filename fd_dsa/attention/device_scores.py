"""Scores of a step's tokens on a device, in chunks that fit one buffer."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from fd_dsa.attention.config import IndexerSizes
from fd_dsa.cache_formats import CACHE_FORMATS
from fd_dsa.device.allocation import (
    CACHED_VIEWS,
    Allocate,
    Buffers,
    Sizes,
    add_buffers,
    buffer_view,
)
from fd_dsa.device.transfers import Transfers, transfers_for
from fd_dsa.errors import KernelUnavailable
from fd_dsa.ops.arrays import rounded_length
from fd_dsa.ops.logits import tile_configs
from fd_dsa.ops.logits.tile_configs import TileConfig, decode_config, prompt_config
from fd_dsa.ops.logits.tile_kernel import score_tiles
from fd_dsa.ops.logits.tile_schedule import PROGRAM_FIELDS, TILE_FIELDS, TileSchedule
from fd_dsa.ops.logits.triton_kernel import score_pages
from fd_dsa.ops.providers import TENSOR_CORE, TRITON, device_kind, refuse, select_provider
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor

View = Callable[..., Tensor]
"""Function that returns the start of a named buffer as a tensor [*counts, *shape of one value]."""
Part = tuple[int, int]
"""First token that is scored, and the end of those tokens."""
Use = Callable[..., None]
"""Function of the scores of a chunk, and by name of its `first_token`.

It reads the scores, float32 [rows, width], before the next chunk overwrites them.
"""


def kernel_kind(tensor: Tensor) -> str:
    """Return the kind of device whose kernels take a tensor, as `device_kind` names it.

    Triton's interpreter has its tensors in host memory.
    """
    kind = device_kind(tensor)
    return "interpreter" if kind == "cpu" else kind


class PageScores:
    """Scores by the kernel for every cache and GPU, with one buffer for all steps.

    Args:
        view: returns the start of a named buffer as a tensor.
        num_logits: size of the buffer "logits", at least one token's scores of the longest row.

    Attributes:
        is_captured: True if a graph reads a schedule that it does not make. `prepare` must then run
            before every replay.
    """

    def __init__(self, sizes: IndexerSizes, view: View, num_logits: int) -> None:
        self._num_logits, self.is_captured = num_logits, False
        self._max_width = sizes.max_keys
        self._logits = lru_cache(maxsize=CACHED_VIEWS)(partial(_logits, view))

    def prepare(self, step: ForwardMeta, part: Part) -> None:
        """Prepare the scores of all layers of a step. This class needs no preparation."""

    def compute(
        self, step: ForwardMeta, part: Part, q: Tensor, weights: Tensor, cache: Tensor, use: Use
    ) -> None:
        """Score the tokens of the part prepared last, chunk by chunk."""
        begin, end = part
        stride, width, rows = self._chunks(step, end - begin)
        for chunk, first in enumerate(range(begin, end, rows)):
            logits = self._logits(min(rows, end - first), stride, width)
            self._score(step, q, weights, cache, logits, first, chunk)
            use(logits, first_token=first)

    def _chunks(self, step: ForwardMeta, num_tokens: int) -> tuple[int, int, int]:
        """Return stride and width of the rows of scores, and the tokens of a chunk."""
        width = rounded_length(step.max_seqlen_k, self._max_width)
        return width, width, max(1, self._num_logits // width)

    def _score(
        self,
        step: ForwardMeta,
        q: Tensor,
        weights: Tensor,
        cache: Tensor,
        logits: Tensor,
        first: int,
        chunk: int,
    ) -> None:
        """Fill `logits` for chunk number `chunk`, which begins at token `first`."""
        score_pages(q, weights, cache, step, logits, first)


class TileScores(PageScores):
    """Scores on tensor cores by one schedule a step, see `tiles_unsupported_reason`.

    The kernel has two configurations, one for steps of decode rows only and one for all others. A
    captured graph may be replayed in every step of its kind and number of tokens, after `prepare`.
    Captured scores are as wide as the longest possible row, and the kernel reads lengths on the
    device.

    Its `view` also has the buffers of `tile_sizes`.

    Attributes:
        max_whole: max tokens whose scores fit at once for any length of their rows. Longer steps
            are cut into chunks by their longest row, unless a step of as many tokens was captured.
    """

    def __init__(
        self,
        sizes: IndexerSizes,
        view: View,
        num_logits: int,
        transfers: Transfers,
    ) -> None:
        super().__init__(sizes, view, num_logits)
        self._index_topk, self._transfers = sizes.topk, transfers
        self.max_whole = num_logits // self._max_width
        # numbers of tokens of captured steps above max_whole
        self._captured: set[int] = set()
        # True if the graph that reads the newest schedule also makes it
        self._is_inside = False
        tokens, processors = sizes.max_num_tokens, transfers.traits.num_processors
        buffers = view("tiles", tokens), view("work_ends", tokens)
        chunks = -(-tokens // self.max_whole)
        # schedule of steps without prompts, and with prompts
        self._schedules = [
            TileSchedule(
                tile, *buffers, view("programs", chunks, processors * tile.programs_per_processor)
            )
            for tile in _tile_configs(sizes)
        ]

    def prepare(self, step: ForwardMeta, part: Part) -> None:
        """Make the schedule of a step by one launch."""
        self._is_inside = self._transfers.is_capturing()
        stride, _, rows = self._chunks(step, part[1] - part[0])
        self._schedule_of(step).fill(step, stride, rows, self._index_topk, part)

    def _schedule_of(self, step: ForwardMeta) -> TileSchedule:
        return self._schedules[step.num_prefill_tokens > 0]

    def _chunks(self, step: ForwardMeta, num_tokens: int) -> tuple[int, int, int]:
        width = rounded_length(step.max_seqlen_k, self._max_width)
        is_capturing = self._transfers.is_capturing()
        self.is_captured |= is_capturing and not self._is_inside
        if num_tokens > self.max_whole and is_capturing:
            # all replays of the graph have these chunks
            self._captured.add(num_tokens)
        if num_tokens <= self.max_whole or num_tokens in self._captured:
            # a replay may have longer rows; an eager step is faster with fewer columns
            return self._max_width, self._max_width if is_capturing else width, self.max_whole
        return width, width, self._num_logits // width

    def _score(
        self,
        step: ForwardMeta,
        q: Tensor,
        weights: Tensor,
        cache: Tensor,
        logits: Tensor,
        first: int,
        chunk: int,
    ) -> None:
        where = {"first_token": first, "chunk": chunk}
        score_tiles(q, weights, cache, step, self._schedule_of(step), logits, **where)


def _logits(view: View, num_rows: int, stride: int, width: int) -> Tensor:
    """Return [num_rows, width] scores whose rows are `stride` values apart."""
    logits = view("logits", num_rows, stride)
    return logits if width == stride else logits[:, :width]


def _tile_configs(sizes: IndexerSizes) -> tuple[TileConfig, TileConfig]:
    """Return the kernel's configurations for steps without and with prompts."""
    heads, is_fp8 = sizes.num_heads, CACHE_FORMATS[sizes.cache_dtype].is_fp8
    decode = decode_config(heads, sizes.tokens_per_row, is_fp8=is_fp8)
    return decode, prompt_config(heads, is_fp8=is_fp8)


def tiles_unsupported_reason(sizes: IndexerSizes) -> str | None:
    """Return why TileScores do not support an indexer, or None if they do."""
    types = sizes.cache_dtype, sizes.q_dtype
    return tile_configs.unsupported_reason(*types, sizes.block_size, sizes.num_heads, sizes.width)


def tile_sizes(sizes: IndexerSizes, num_logits: int, num_processors: int) -> Sizes:
    """Return the sizes of the buffers of TileScores on `num_processors` multiprocessors."""
    tokens = sizes.max_num_tokens
    chunks = -(-tokens // (num_logits // sizes.max_keys))
    programs = num_processors * max(tile.programs_per_processor for tile in _tile_configs(sizes))
    return {
        "tiles": (tokens, (TILE_FIELDS,), "int32"),
        "work_ends": (tokens, (), "int32"),
        "programs": (chunks * programs, (PROGRAM_FIELDS,), "int32"),
    }


class SelectedScores:
    """Scores by the fastest kernels that support an indexer, or the next if one fails to compile.

    Args:
        kind: result of `kernel_kind`.
        buffers: it has "logits", and gets the other buffers of the kernels.

    Attributes:
        kernels: selected kernels; replaced if one cannot be compiled.
    """

    def __init__(
        self, sizes: IndexerSizes, kind: str, buffers: Buffers, allocate: Allocate
    ) -> None:
        self._sizes, self._kind = sizes, kind
        self._buffers, self._allocate = buffers, allocate
        self.kernels = self._select()

    def prepare(self, step: ForwardMeta, part: Part) -> None:
        """Prepare the scores of all layers of a step, see `_call`."""
        self._call(lambda kernels: kernels.prepare(step, part))

    def compute(
        self, step: ForwardMeta, part: Part, q: Tensor, weights: Tensor, cache: Tensor, use: Use
    ) -> None:
        """Score the tokens of the part prepared last, chunk by chunk, see `_call`."""
        self._call(lambda kernels: kernels.compute(step, part, q, weights, cache, use))

    def _select(self) -> PageScores:
        """Return the selected kernels."""
        sizes, logits = self._sizes, self._buffers["logits"][0]
        made = sizes, partial(buffer_view, self._buffers), int(logits.shape[0])
        conditions = {TENSOR_CORE: tiles_unsupported_reason(sizes)}
        if select_provider("indexer_logits", self._kind, conditions).provider == TRITON:
            return PageScores(*made)
        transfers = transfers_for(logits)
        others = tile_sizes(sizes, made[2], transfers.traits.num_processors)
        add_buffers(self._buffers, others, self._allocate)
        return TileScores(*made, transfers)

    def _call(self, call: Callable[[PageScores], None]) -> None:
        """Call with the kernels, again with the next provider's after a failed compilation.

        Raises:
            KernelUnavailable: no other provider is allowed, or a captured graph reads the schedule
                of this one.
        """
        try:
            call(self.kernels)
        except KernelUnavailable as error:
            if type(self.kernels) is PageScores or self.kernels.is_captured:
                raise
            refuse("indexer_logits", self._kind, TENSOR_CORE, error)
            self.kernels = self._select()
            call(self.kernels)
