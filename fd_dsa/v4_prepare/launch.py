"""The launch of the expand kernel, bound to buffers and slabs that never move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.v4_prepare.buffers import Array, V4Buffers
from fd_dsa.v4_prepare.config import OUTPUT_SHAPES, V4PrepareConfig
from fd_dsa.v4_prepare.kernel import expand_kernel
from fd_dsa.v4_prepare.slab import ERROR_SLOTS, ERROR_WORDS, SlabLayout

# stands for an offset or address of more than 32 bits, so that the bound scalar has 64
_WIDE = 1 << 40
_MAX_ROW_TILE = 1024
# table cells that a program stores at a time; most steps change none of a row, or one
_RUN_TILE = 128
# programs that a launch of decode rows, and one that may hold long rows, spreads over
_DECODE_PROGRAMS, _PREFILL_PROGRAMS = 512, 8192
_LONG_ROW = 64


@dataclass(frozen=True)
class ExpandTiles:
    """How the work of a step is cut into programs; all tiles are powers of two.

    Attributes:
        token_parts, window_parts, hca_parts: programs that share a row's work of each kind.
        padding_programs: programs that share the padding, times the parts.
        token_tile: tokens of one round of the first kind.
        window_rows: tokens whose windows one round of the second kind writes.
        hca_tile, hca_group: entries that a round of the third kind loads, and tokens it loads
            them for.
        row_tile: rows that a program sums at a time; at most 1024.
        num_warps: warps of a program.
    """

    token_parts: int
    window_parts: int
    hca_parts: int
    padding_programs: int
    token_tile: int
    window_rows: int
    hca_tile: int
    hca_group: int
    row_tile: int
    num_warps: int


def tiles_for(cfg: V4PrepareConfig) -> ExpandTiles:
    """The cut for the steps of a configuration: a long row is not the work of one program."""
    longest = cfg.max_tokens_per_seq
    is_decode = longest <= _LONG_ROW
    programs = _DECODE_PROGRAMS if is_decode else _PREFILL_PROGRAMS
    most = max(1, programs // cfg.max_num_seqs)
    token_tile = min(max(32, power_of_two(longest)), 128)
    window_rows = min(power_of_two(longest), 8)
    hca_group = min(power_of_two(longest), 8)
    entries = max(1, cfg.max_model_len // cfg.hca_ratio)
    hca_tile = min(max(32, power_of_two(entries)), 128)
    row_tile = min(max(32, power_of_two(cfg.max_num_seqs)), _MAX_ROW_TILE)
    if hca_tile == row_tile:
        # tiles of one shape get one layout, and that of the rows does not fit unaligned lists
        hca_tile *= 2
    num_items = -(-entries // hca_tile) * -(-longest // hca_group)
    return ExpandTiles(
        token_parts=min(-(-longest // token_tile), most),
        window_parts=min(-(-longest // window_rows), most),
        hca_parts=0 if cfg.hca_mode == "table" else min(num_items, most),
        padding_programs=min(-(-cfg.max_num_tokens // 16), 64),
        token_tile=token_tile,
        window_rows=window_rows,
        hca_tile=hca_tile,
        hca_group=hca_group,
        row_tile=row_tile,
        num_warps=1 if is_decode else 4,
    )


def power_of_two(number: int) -> int:
    """The lowest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def expand_constants(cfg: V4PrepareConfig, tiles: ExpandTiles) -> dict[str, int | bool]:
    """What is compiled into the kernel; sizes of buffers are not among it."""
    return {
        "WINDOW": cfg.window_size,
        "DRAFTS": cfg.spec_tokens,
        "BLOCK_SIZE": cfg.block_size,
        "CSA_RATIO": cfg.csa_ratio,
        "HCA_RATIO": cfg.hca_ratio,
        # no token has more entries than this, and RATIO * TOPK stays in int32
        "TOPK": min(cfg.index_topk, cfg.max_model_len // cfg.csa_ratio + 1),
        "IS_PAGED": cfg.swa == "paged",
        "ERROR_SLOTS": ERROR_SLOTS,
        "ERROR_WORDS": ERROR_WORDS,
        "TOKEN_PARTS": tiles.token_parts,
        "WINDOW_PARTS": tiles.window_parts,
        "HCA_PARTS": tiles.hca_parts,
        "ROW_TILE": tiles.row_tile,
        "TOKEN_TILE": tiles.token_tile,
        "WINDOW_ROWS": tiles.window_rows,
        "WINDOW_TILE": power_of_two(cfg.window_size),
        "HCA_TILE": tiles.hca_tile,
        "HCA_GROUP": tiles.hca_group,
        "RUN_TILE": _RUN_TILE,
    }


def expand_sizes(cfg: V4PrepareConfig, layout: SlabLayout) -> dict[str, int]:
    """The numbers that are bound once and select no other kernel."""
    return {
        "num_rows": cfg.max_num_seqs,
        "num_tokens": cfg.max_num_tokens,
        "row_stride": cfg.max_blocks_per_seq,
        "comp_base": cfg.comp_base,
        "csa_plan_rows": cfg.plan_capacity(cfg.csa_ratio),
        "csa_wplan_rows": cfg.wplan_capacity(cfg.csa_ratio),
        "hca_plan_rows": cfg.plan_capacity(cfg.hca_ratio),
        "hca_wplan_rows": cfg.wplan_capacity(cfg.hca_ratio),
        "ctx_at": layout.ctx,
        "q_at": layout.q,
        "slot_at": layout.slot,
        "run_column_at": layout.run_column,
        "run_start_at": layout.run_start,
        "values_at": layout.values,
    }


class ExpandLaunch:
    """Writes every output of a step, and the table cells that changed, in one launch.

    Both forms, with and without rollback, are compiled and loaded here, and none later. Nothing
    is launched: the buffers hold what they held until the first step.

    A row whose rollback is negative or leaves less than the step adds becomes padding: its tokens
    keep their places, but have no row, no keys and no part in any plan, and its `ctx` is 0. Fault,
    row, value found, limit and stamp of the lowest such row go to slot `stamp % ERROR_SLOTS` of
    `error_words`; they are there when the launch is done. A sound step writes no error words.

    Args:
        cfg: sizes of the steps.
        layout: where the sections of a slab start.
        buffers: where the kernel writes; all int32.
        slabs: int32 on the device, contiguous; one or more slabs as `layout` says.
        error_words: int32 [ERROR_SLOTS, ERROR_WORDS] in memory of the host that the device can
            write: `Transfers.host_buffer`.
        tiles: another cut into programs than that of `tiles_for`.

    Raises:
        LaunchError: a tensor is not where kernels run.
        BackendUnavailable: no GPU, and no interpreter either.
    """

    def __init__(
        self,
        cfg: V4PrepareConfig,
        layout: SlabLayout,
        buffers: V4Buffers,
        slabs: Array,
        error_words: np.ndarray,
        tiles: ExpandTiles | None = None,
    ) -> None:
        tiles = tiles or tiles_for(cfg)
        # the kernel knows only their address
        self._error_words = error_words
        arguments: dict[str, Any] = {
            f"{name}_ptr": getattr(buffers, name)
            for name in (*OUTPUT_SHAPES(cfg), "hca_idx", "block_table")
        }
        arguments |= expand_sizes(cfg, layout) | expand_constants(cfg, tiles)
        arguments |= {
            "slabs_ptr": slabs,
            "slab_offset": _WIDE,
            "error_address": error_words.ctypes.data,
            "num_warps": tiles.num_warps,
        }
        grid = (
            cfg.max_num_seqs + tiles.padding_programs,
            tiles.token_parts + tiles.window_parts + tiles.hca_parts,
        )
        self._plain = expand_kernel.bind(
            grid, **arguments, rollback_ptr=None, num_rollback=0, scalars=("slab_offset",)
        )
        # any int32 tensor stands for the rollback until there is one
        self._with_rollback = expand_kernel.bind(
            grid,
            **arguments,
            rollback_ptr=buffers.ctx,
            num_rollback=0,
            scalars=("slab_offset", "num_rollback"),
        )
        self._rollback_address = 0

    def __call__(self, slab_offset: int, rollback: Array | None = None) -> None:
        """Queue the step of a slab on the current stream, or put it into a graph.

        Args:
            slab_offset: words before the slab in `slabs`.
            rollback: int32 on the device, contiguous, one number for each row of the step or more:
                how many of the row's tokens before this step were rejected. It is read when the
                launch runs, and ignored for idle rows.

        Raises:
            LaunchError: the rollback is not int32, or not on the buffers' device.
        """
        if rollback is None:
            self._plain(slab_offset)
            return
        if rollback.data_ptr() != self._rollback_address:
            # the bound tensor keeps its memory, so nothing else can come to lie there
            self._with_rollback.exchange(rollback_ptr=rollback)
            self._rollback_address = rollback.data_ptr()
        self._with_rollback(slab_offset, int(rollback.shape[0]))
