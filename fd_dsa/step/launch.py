"""The launches of a step's kernels, bound to buffers that never move."""

from __future__ import annotations

from fd_dsa.step.checks import INT32_MAX, StepCounts, StepInputs, StepLimits
from fd_dsa.step.forward_meta import Array
from fd_dsa.step.kernel import decode_step_metadata_kernel, mixed_step_metadata_kernel
from fd_dsa.step.views import FIELDS

# lanes and warps of a program: rows of a decode-only step, tokens of any other
DECODE_TILE, DECODE_WARPS = 32, 1
MIXED_TILE, MIXED_WARPS = 64, 8
# rows summed at a time; from fewer than a tile's tokens Triton 3.3 cannot compile a gather
_MIN_ROW_TILE, _MAX_ROW_TILE = MIXED_TILE, 1024

_SCALARS = ("num_rows", "num_padded_tokens", "row_stride")
Buffers = dict[str, Array | None]


class StepLaunch:
    """Launches the kernels for steps of one builder; both are compiled here, none later.

    The first launch of each, here, writes an empty step: the buffers hold padding from the
    beginning. A step clears all rows after its own, and all tokens that a step before it may have
    left. The host does not see the replays of a captured launch: each writes the tokens of its
    capture and no others, and any later step may come after one of them.

    Args:
        limits: sizes that every step keeps to.
        buffers: where the kernels write, of `views.new_buffers`.
    """

    def __init__(self, limits: StepLimits, buffers: Buffers) -> None:
        self._forms = _Form(limits, buffers, False), _Form(limits, buffers, True)
        self._tokens, self._windows = _Extent(), _Extent()
        empty = (buffers["cu_seqlens_q"],) * len(StepInputs._fields)
        for form in self._forms:
            form.launch(empty, 0, limits.max_num_tokens, 0)

    def __call__(
        self, inputs: tuple[Array, ...], counts: StepCounts, is_captured: bool = False
    ) -> None:
        """Queue the step of four checked tensors of the same rows, or put it into a graph."""
        padded, tables = counts.num_padded_tokens, inputs[3]
        has_prefill = counts.num_prefill_tokens > 0
        extents = (self._tokens, self._windows) if has_prefill else (self._tokens,)
        written = padded if is_captured else max(padded, *(extent.used for extent in extents))
        self._forms[has_prefill].launch(
            inputs, int(tables.shape[0]), written, int(tables.stride()[0])
        )
        for extent in extents:
            extent.follow(padded, is_captured)


class _Extent:
    """How many tokens of some buffers may hold more than padding.

    Attributes:
        used: tokens that the next step must clear or write.
    """

    def __init__(self) -> None:
        self.used = self._captured = 0

    def follow(self, num_tokens: int, is_captured: bool) -> None:
        """A step of this many tokens was launched, or captured and so not launched yet."""
        if is_captured:
            self._captured = max(self._captured, num_tokens)
            num_tokens = self.used
        self.used = max(num_tokens, self._captured)


class _Form:
    """The kernel for steps with or without prefill rows, bound to the buffers."""

    def __init__(self, limits: StepLimits, buffers: Buffers, has_prefill: bool) -> None:
        rows, kernel = limits.max_num_seqs, decode_step_metadata_kernel
        self._tile, warps, self._min_programs = DECODE_TILE, DECODE_WARPS, -(-rows // DECODE_TILE)
        if has_prefill:
            kernel, self._min_programs = mixed_step_metadata_kernel, 1
            self._tile, warps = MIXED_TILE, MIXED_WARPS
        # a decode-only step reads no encoder lengths: they are 0
        self._first = 0 if has_prefill else 1
        self._names = [f"{name}_ptr" for name in StepInputs._fields[self._first :]]
        self._addresses: list[int] = []
        outputs = [name for name, field in FIELDS.items() if has_prefill or not field.is_window]
        row_tile = row_tile_for(rows)
        self._bound = kernel.bind(
            (1,),
            **dict.fromkeys(self._names, buffers["cu_seqlens_q"]),
            **{f"{name}_ptr": buffers[name] for name in outputs},
            num_rows=0,
            num_padded_rows=rows,
            num_padded_tokens=0,
            row_stride=0,
            num_columns=limits.max_blocks_per_seq,
            last_block=INT32_MAX if limits.num_blocks is None else limits.num_blocks - 1,
            BLOCK_SIZE=limits.block_size,
            ROW_TILE=row_tile,
            NUM_ROW_TILES=-(-rows // row_tile),
            TILE=self._tile,
            num_warps=warps,
            scalars=_SCALARS,
        )

    def launch(
        self, inputs: tuple[Array, ...], num_rows: int, num_padded_tokens: int, row_stride: int
    ) -> None:
        """Queue the kernel over rows and padded tokens."""
        read = inputs[self._first :]
        addresses = [tensor.data_ptr() for tensor in read]
        if addresses != self._addresses:
            # the bound tensors keep their memory, so no other tensor gets these addresses
            self._bound.exchange(**dict(zip(self._names, read, strict=True)))
            self._addresses = addresses
        num_programs = max(self._min_programs, -(-num_padded_tokens // self._tile))
        self._bound(num_rows, num_padded_tokens, row_stride, grid=(num_programs,))


def row_tile_for(max_num_seqs: int) -> int:
    """Rows that a program sums at a time: a power of two, all rows if there are not too many."""
    power = 1 << (max_num_seqs - 1).bit_length()
    return min(max(power, _MIN_ROW_TILE), _MAX_ROW_TILE)
