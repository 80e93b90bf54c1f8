"""Staged steps on a device: copies on a stream of their own, and one launch a step.

Launches are bound to buffers and slabs that never move.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.step.staging import InputStaging
from fd_dsa.v4_prepare.builder import Allocate, Array, V4Arrays, check_topk
from fd_dsa.v4_prepare.checks import rollback_error
from fd_dsa.v4_prepare.config import OUTPUT_SHAPES, V4PrepareConfig
from fd_dsa.v4_prepare.kernel import csa_rows_kernel, expand_kernel
from fd_dsa.v4_prepare.slab import (
    ERROR_SLOTS,
    ERROR_WORDS,
    FAULT_ROLLBACK,
    MAX_STAMP,
    StepWords,
    section_words,
    slab_words,
)
from fd_dsa.v4_prepare.table import TableMirror

import triton

# stands for an offset or address of more than 32 bits, so that the bound scalar has 64
_WIDE = 1 << 40
_MAX_ROW_TILE = 1024
# table cells that a program stores at a time; most steps change none of a row, or one
_RUN_TILE = 128
# programs that a launch of decode rows, and one that may hold long rows, spreads over
_DECODE_PROGRAMS, _PREFILL_PROGRAMS = 512, 8192
_LONG_ROW = 64
# chosen entries that a program translates at a time
_CSA_TILE = 512
_FAULT_STAMP = 4
_NO_FAULTS = bytes(4 * ERROR_SLOTS)


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
    token_tile = min(max(32, triton.next_power_of_2(longest)), 128)
    window_rows = min(triton.next_power_of_2(longest), 8)
    hca_group = min(triton.next_power_of_2(longest), 8)
    entries = max(1, cfg.max_model_len // cfg.hca_ratio)
    hca_tile = min(max(32, triton.next_power_of_2(entries)), 128)
    row_tile = min(max(32, triton.next_power_of_2(cfg.max_num_seqs)), _MAX_ROW_TILE)
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


def expand_arguments(cfg: V4PrepareConfig, tiles: ExpandTiles) -> dict[str, int | bool]:
    """What is bound beside the tensors: numbers that select no other kernel, then constants."""
    return {
        "num_rows": cfg.max_num_seqs,
        "num_tokens": cfg.max_num_tokens,
        "row_stride": cfg.max_blocks_per_seq,
        "comp_base": cfg.comp_base,
        "csa_plan_rows": cfg.plan_capacity(cfg.csa_ratio),
        "csa_wplan_rows": cfg.wplan_capacity(cfg.csa_ratio),
        "hca_plan_rows": cfg.plan_capacity(cfg.hca_ratio),
        "hca_wplan_rows": cfg.wplan_capacity(cfg.hca_ratio),
        "section": section_words(cfg),
        "WINDOW": cfg.window_size,
        "DRAFTS": cfg.spec_tokens,
        "BLOCK_SIZE": cfg.block_size,
        "CSA_RATIO": cfg.csa_ratio,
        "HCA_RATIO": cfg.hca_ratio,
        # no token has more entries than this, and RATIO * TOPK stays in int32
        "TOPK": min(cfg.index_topk, cfg.max_model_len // cfg.csa_ratio + 1),
        "IS_PAGED": cfg.swa == "paged",
        "TOKEN_PARTS": tiles.token_parts,
        "WINDOW_PARTS": tiles.window_parts,
        "HCA_PARTS": tiles.hca_parts,
        "ROW_TILE": tiles.row_tile,
        "TOKEN_TILE": tiles.token_tile,
        "WINDOW_ROWS": tiles.window_rows,
        "WINDOW_TILE": triton.next_power_of_2(cfg.window_size),
        "HCA_TILE": tiles.hca_tile,
        "HCA_GROUP": tiles.hca_group,
        "RUN_TILE": _RUN_TILE,
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
        buffers: where the kernel writes; all int32.
        slabs: int32 on the device, contiguous; one or more slabs of `slab_words`.
        error_words: int32 [ERROR_SLOTS, ERROR_WORDS] in memory of the host that the device can
            write: `Transfers.host_buffer`.
        tiles: another cut into programs than that of `tiles_for`.

    Raises:
        LaunchError: a tensor is not where kernels run.
        BackendUnavailable: no GPU, and no interpreter either.
    """

    def __init__(
        self,
        buffers: V4Arrays,
        slabs: Array,
        error_words: np.ndarray,
        tiles: ExpandTiles | None = None,
    ) -> None:
        cfg = buffers.config
        tiles = tiles or tiles_for(cfg)
        # the kernel knows only their address
        self._error_words = error_words
        names = (*OUTPUT_SHAPES(cfg), "hca_idx", "block_table")
        arguments: dict[str, Any] = {f"{name}_ptr": getattr(buffers, name) for name in names}
        arguments |= expand_arguments(cfg, tiles) | {
            "slabs_ptr": slabs,
            "slab_offset": _WIDE,
            "error_address": error_words.ctypes.data,
            "num_warps": tiles.num_warps,
            "num_rollback": 0,
        }
        parts = tiles.token_parts + tiles.window_parts + tiles.hca_parts
        grid = (cfg.max_num_seqs + tiles.padding_programs, parts)
        self._plain = expand_kernel.bind(
            grid, **arguments, rollback_ptr=None, scalars=("slab_offset",)
        )
        # any int32 tensor stands for the rollback until there is one
        self._with_rollback = expand_kernel.bind(
            grid, **arguments, rollback_ptr=buffers.ctx, scalars=("slab_offset", "num_rollback")
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
            # the bound launch keeps the tensor's memory, so no other can come to that address
            self._with_rollback.exchange(rollback_ptr=rollback)
            self._rollback_address = rollback.data_ptr()
        self._with_rollback(slab_offset, int(rollback.shape[0]))


class DeviceSteps:
    """Slabs, outputs and launches on a device; a step is staged, then expanded, in order.

    Args:
        cfg: sizes of the steps.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        table: the blocks of all rows.
        num_slabs: slabs that take turns.

    Attributes:
        buffers: the outputs.
        staged: stamp, slab and tokens of the steps that are not expanded yet.
    """

    def __init__(
        self, cfg: V4PrepareConfig, allocate: Allocate, table: TableMirror, num_slabs: int
    ) -> None:
        self._cfg, self._allocate, self._table = cfg, allocate, table
        self._words, self._slab_words = StepWords(cfg), slab_words(cfg)
        self.buffers = V4Arrays(cfg, allocate)
        self._staging = InputStaging(allocate, self._slab_words, num_slabs)
        # page-locked: the kernel writes a fault to the host itself, no copy is needed to see one
        memory = self._staging.transfers.host_buffer(4 * ERROR_SLOTS * ERROR_WORDS)
        self._faults = memory.view(np.int32).reshape(ERROR_SLOTS, ERROR_WORDS)
        self._fault_stamps = self._faults[:, _FAULT_STAMP]
        self._launch = ExpandLaunch(self.buffers, self._staging.slabs, self._faults)
        self._stamp = self._num_tokens = 0
        self.staged: deque[tuple[int, int, int]] = deque()
        self._expanded: deque[tuple[int, int, int]] = deque(maxlen=2 * num_slabs)
        self._csa: tuple[Any, Array] | None = None
        self._topk_address = 0

    def begin(self) -> None:
        """Take a slab, before anything of a step is written.

        Raises:
            RuntimeError: a graph is being captured.
        """
        self._slab = self._staging.next_slab()

    def take_rows(self, q: np.ndarray, slot: np.ndarray, num_tokens: int) -> None:
        """The numbers of tokens and the slots [B] of the steps from now on, and their T."""
        self._words.take_rows(q, slot, num_tokens)
        self._num_tokens = num_tokens

    def stage(self, ctx: np.ndarray) -> None:
        """Fill the slab and queue its copy."""
        self._stamp = self._stamp % MAX_STAMP + 1
        num_words = self._words.write(self._slab, self._stamp, ctx, self._table)
        self.staged.append((self._stamp, self._staging.upload(num_words), self._num_tokens))

    def expand(self, rollback: Array | None) -> None:
        """Queue the launch of the earliest staged step after its copy."""
        slab = self.staged[0][1]
        self._staging.acquire(slab)
        self._launch(slab * self._slab_words, rollback)
        self._staging.release(slab)
        self._expanded.append(self.staged.popleft())

    def poll_error(self) -> None:
        """Raise the earliest error of the steps that have run, once; see `V4Prepare`."""
        if self._fault_stamps.tobytes() == _NO_FAULTS:
            return
        # a word may be seen before the others of its step
        used = self._staging.used
        running = {stamp for stamp, slab, _ in self._expanded if not used[slab].done()}
        for stamp, at in sorted(zip(self._fault_stamps.tolist(), range(ERROR_SLOTS), strict=True)):
            if stamp and stamp not in running:
                fault, row, value, limit = self._faults[at, :4].tolist()
                self._faults[at] = 0
                raise rollback_error(row, fault == FAULT_ROLLBACK, value, limit)

    def csa_translate(self, local_topk: Array) -> Array:
        """Queue the launch that turns chosen entries into rows; see `V4Prepare`."""
        cfg, buffers = self._cfg, self.buffers
        check_topk(cfg, local_topk, self._expanded[-1][2])
        if self._csa is None:
            rows = self._allocate((max(cfg.csa_list_length, 1),), "int32")
            launch = csa_rows_kernel.bind(
                (cfg.max_num_tokens,),
                local_topk_ptr=local_topk,
                csa_rows_ptr=rows,
                req_of_token_ptr=buffers.req_of_token,
                csa_visible_ptr=buffers.csa_visible,
                csa_indptr_ptr=buffers.csa_indptr,
                block_table_ptr=buffers.block_table,
                num_given=0,
                row_stride=cfg.max_blocks_per_seq,
                comp_base=cfg.comp_base,
                TOPK=cfg.index_topk,
                ENTRIES_PER_BLOCK=cfg.block_size // cfg.csa_ratio,
                TILE=min(triton.next_power_of_2(cfg.index_topk), _CSA_TILE),
                scalars=("num_given",),
            )
            self._csa = launch, rows
        launch, rows = self._csa
        if local_topk.data_ptr() != self._topk_address:
            launch.exchange(local_topk_ptr=local_topk)
            self._topk_address = local_topk.data_ptr()
        launch(int(local_topk.shape[0]))
        return rows
