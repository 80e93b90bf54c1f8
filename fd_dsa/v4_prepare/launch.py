"""Staged steps on a device: copies on a separate stream, and one launch a step.

Launches are bound to buffers and slabs at fixed addresses.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.staging import InputStaging
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2
from fd_dsa.v4_prepare.builder import V4Arrays, check_topk
from fd_dsa.v4_prepare.checks import Integers, rollback_error
from fd_dsa.v4_prepare.config import OUTPUT_SHAPES, V4PrepareConfig
from fd_dsa.v4_prepare.kernel import (
    ERROR_SLOTS,
    ERROR_WORDS,
    HEADER_WORDS,
    csa_rows_kernel,
    expand_kernel,
)
from fd_dsa.v4_prepare.table import BlockTable, Run

# a large value, so that offsets and addresses are bound as 64-bit scalars
_WIDE = 1 << 40
_MAX_ROW_TILE = 1024
# table cells stored by a program at a time; most steps change at most one cell of a row
_RUN_TILE = 128
# target number of programs of a launch with decode rows only, and with long rows
_DECODE_PROGRAMS, _PREFILL_PROGRAMS = 512, 8192
_LONG_ROW = 64
# selected entries translated by a program at a time
_CSA_TILE = 512
_FAULT_STAMP = 4
_NO_FAULTS = bytes(4 * ERROR_SLOTS)
# steps are stamped 1, 2, ... up to this number and then from 1 again; 0 is not a step
_MAX_STAMP = 2**31 - 1


def section_words(cfg: V4PrepareConfig) -> int:
    return -(-(cfg.max_num_seqs + 1) // HEADER_WORDS) * HEADER_WORDS


def tiles_for(cfg: V4PrepareConfig) -> dict[str, int]:
    """Return the numbers of programs and the tile sizes.

    A long row is split among programs.

    Returns:
        TOKEN_PARTS, WINDOW_PARTS, HCA_PARTS: number of programs for each kind of a row's work.
        TOKEN_TILE: tokens of one round of the first kind.
        WINDOW_ROWS: tokens whose windows are written by one round of the second kind.
        HCA_TILE, HCA_GROUP: entries loaded by a round of the third kind, and tokens that share
            them.
        ROW_TILE: rows summed by a program at a time, at most 1024.
        num_warps: warps of a program.
        All tiles are powers of two.
    """
    longest = cfg.max_tokens_per_seq
    is_decode = longest <= _LONG_ROW
    programs = _DECODE_PROGRAMS if is_decode else _PREFILL_PROGRAMS
    max_parts = max(1, programs // cfg.max_num_seqs)
    token_tile = min(max(32, next_power_of_2(longest)), 128)
    group = min(next_power_of_2(longest), 8)
    entries = max(1, cfg.max_model_len // cfg.hca_ratio)
    hca_tile = min(max(32, next_power_of_2(entries)), 128)
    row_tile = min(max(32, next_power_of_2(cfg.max_num_seqs)), _MAX_ROW_TILE)
    if hca_tile == row_tile:
        # tiles of equal shape share a layout, and the layout of rows does not suit unaligned lists
        hca_tile *= 2
    num_items = -(-entries // hca_tile) * -(-longest // group)
    return {
        "TOKEN_PARTS": min(-(-longest // token_tile), max_parts),
        "WINDOW_PARTS": min(-(-longest // group), max_parts),
        "HCA_PARTS": 0 if cfg.hca_mode == "table" else min(num_items, max_parts),
        "ROW_TILE": row_tile,
        "TOKEN_TILE": token_tile,
        "WINDOW_ROWS": group,
        "HCA_TILE": hca_tile,
        "HCA_GROUP": group,
        "num_warps": 1 if is_decode else 4,
    }


def expand_arguments(cfg: V4PrepareConfig) -> dict[str, int | bool]:
    """Return the launch arguments other than tensors: plain numbers, then constants."""
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
        # no token has more entries, and RATIO * TOPK fits int32
        "TOPK": min(cfg.index_topk, cfg.max_model_len // cfg.csa_ratio + 1),
        "IS_PAGED": cfg.swa == "paged",
        "WINDOW_TILE": next_power_of_2(cfg.window_size),
        "RUN_TILE": _RUN_TILE,
        **tiles_for(cfg),
    }


class DeviceSteps:
    """Slabs, outputs and launches on a device.

    Steps are staged, then expanded, in order.

    Both forms of the launch, with and without rollback, are compiled and loaded by the constructor.
    It launches no kernel, so the buffers keep their contents until the first step.

    A row whose rollback is negative or leaves less than the step adds becomes padding. Its tokens
    keep their indices, but have no row, no keys and no part in any plan, and its `ctx` is 0. The
    kernel writes the lowest such row to page-locked host memory, so the host sees it without a
    copy. A valid step writes no fault.

    Args:
        table: the blocks of all rows.
        num_slabs: number of slabs, used in turn.

    Attributes:
        buffers: the outputs.
        staged: stamp, slab and tokens of the steps that are not expanded yet.
        cfg: as given.
        staging: slabs of the steps.
        first_value: index of a slab's first table cell, words.
        stamp: number of the newest step.

    Raises:
        LaunchError: a tensor is not on a device that runs kernels.
        BackendUnavailable: there is no GPU, and the interpreter is off.
    """

    def __init__(
        self, cfg: V4PrepareConfig, allocate: Allocate, table: BlockTable, num_slabs: int
    ) -> None:
        self.cfg, self._allocate, self._table = cfg, allocate, table
        self.first_value = HEADER_WORDS + 5 * section_words(cfg)
        cells = cfg.max_num_seqs * cfg.max_blocks_per_seq
        self._slab_words = self.first_value + -(-cells // HEADER_WORDS) * HEADER_WORDS
        # each step overwrites only the words that changed
        self._words = np.zeros(self.first_value, np.int32)
        self._sections = self._words[HEADER_WORDS:].reshape(5, -1)
        self.buffers = V4Arrays(cfg, allocate)
        self.staging = InputStaging(allocate, self._slab_words, num_slabs)
        memory = self.staging.transfers.host_buffer(4 * ERROR_SLOTS * ERROR_WORDS)
        self._faults = memory.view(np.int32).reshape(ERROR_SLOTS, ERROR_WORDS)
        self._fault_stamps = self._faults[:, _FAULT_STAMP]
        names = (*OUTPUT_SHAPES(cfg), "hca_idx", "block_table")
        arguments: dict[str, Any] = {f"{name}_ptr": getattr(self.buffers, name) for name in names}
        arguments |= expand_arguments(cfg) | {
            "slabs_ptr": self.staging.slabs,
            "slab_offset": _WIDE,
            "error_address": self._faults.ctypes.data,
            "num_rollback": 0,
        }
        parts = sum(arguments[f"{kind}_PARTS"] for kind in ("TOKEN", "WINDOW", "HCA"))
        # the number of programs that share the padding, times the parts
        padding_programs = min(-(-cfg.max_num_tokens // 16), 64)
        grid = (cfg.max_num_seqs + padding_programs, parts)
        self._plain = expand_kernel.bind(
            grid, **arguments, rollback_ptr=None, scalars=("slab_offset",)
        )
        # any int32 tensor represents the rollback until the first one is given
        self._with_rollback = expand_kernel.bind(
            grid,
            **arguments,
            rollback_ptr=self.buffers.ctx,
            scalars=("slab_offset", "num_rollback"),
        )
        self.stamp = self._rollback_address = self._topk_address = 0
        self.staged: deque[tuple[int, int, int]] = deque()
        self._expanded: deque[tuple[int, int, int]] = deque(maxlen=2 * num_slabs)
        self._csa: tuple[Any, Tensor] | None = None

    def stage(
        self, ctx: Integers, q: Integers, slot: Integers, num_tokens: int, runs: list[Run] | None
    ) -> None:
        """Fill a slab with a step that has passed all checks, and enqueue its copy.

        Args:
            ctx, q, slot: [B], any integer dtype.
            num_tokens: T.
            runs: changes of the block table. None = the step differs from the previous one only in
                `ctx`.

        Raises:
            RuntimeError: a graph is being captured.
        """
        # called before the first write, because it raises during a capture
        slab, num_rows = self.staging.next_slab(), len(ctx)
        words, sections, table = self._words, self._sections, self._table
        if runs is not None:
            table.put(runs)
            sections[:2] = 0
            sections[1, :num_rows], sections[2, :num_rows] = q, slot
            words[1], words[2] = num_rows, num_tokens
        sections[0, :num_rows] = ctx
        num_values = 0
        if table.news:
            num_values = table.send(num_rows, sections[3], sections[4], slab[self.first_value :])
        words[0] = self.stamp = self.stamp % _MAX_STAMP + 1
        words[3] = num_values
        slab[: self.first_value] = words
        if num_values:
            # the next step has no changed cells yet
            sections[4] = 0
        index = self.staging.upload(self.first_value + num_values)
        self.staged.append((self.stamp, index, num_tokens))

    def expand(self, rollback: Tensor | None) -> None:
        """Enqueue the launch of the earliest staged step after its copy.

        Args:
            rollback: int32 on the device, contiguous, at least one number for each row of the step:
                number of the row's earlier tokens that were rejected. It is read when the launch
                runs, and ignored for idle rows.

        Raises:
            LaunchError: the rollback is not int32, or not on the buffers' device.
        """
        slab = self.staged[0][1]
        self.staging.acquire(slab)
        self.launch(slab, rollback)
        self.staging.release(slab)
        self._expanded.append(self.staged.popleft())

    def launch(self, slab: int, rollback: Tensor | None = None) -> None:
        """Enqueue the step of a slab on the current stream. See `expand`."""
        offset = slab * self._slab_words
        if rollback is None:
            self._plain(offset)
            return
        if rollback.data_ptr() != self._rollback_address:
            # the bound launch keeps the tensor alive, so its address is not reused
            self._with_rollback.exchange(rollback_ptr=rollback)
            self._rollback_address = rollback.data_ptr()
        self._with_rollback(offset, int(rollback.shape[0]))

    def poll_error(self) -> None:
        """Raise the earliest error of the steps that have run, once. See `V4Prepare`."""
        if self._fault_stamps.tobytes() == _NO_FAULTS:
            return
        # the stamp may become visible before the other words of its step
        used = self.staging.used
        running = {stamp for stamp, slab, _ in self._expanded if not used[slab].done()}
        for stamp, at in sorted(zip(self._fault_stamps.tolist(), range(ERROR_SLOTS), strict=True)):
            if stamp and stamp not in running:
                fault, row, value, q = self._faults[at, :4].tolist()
                self._faults[at] = 0
                raise rollback_error(row, value if fault == 1 else 0, value, q)

    def csa_translate(self, local_topk: Tensor) -> Tensor:
        """Enqueue the launch that converts selected entries to rows. See `V4Prepare`."""
        cfg, buffers = self.cfg, self.buffers
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
                TILE=min(next_power_of_2(cfg.index_topk), _CSA_TILE),
                scalars=("num_given",),
            )
            self._csa = launch, rows
        launch, rows = self._csa
        if local_topk.data_ptr() != self._topk_address:
            launch.exchange(local_topk_ptr=local_topk)
            self._topk_address = local_topk.data_ptr()
        launch(int(local_topk.shape[0]))
        return rows
