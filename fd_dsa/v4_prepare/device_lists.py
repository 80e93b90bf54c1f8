"""The derived lists of a step on a device: one launch each, in memory that never moves."""

from __future__ import annotations

from typing import Any

from fd_dsa.v4_prepare.buffers import Allocate, Array, V4Buffers
from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.fixed_lists import FusedList, Kind, csa_capacity, fused_capacity
from fd_dsa.v4_prepare.launch import power_of_two
from fd_dsa.v4_prepare.list_kernel import csa_rows_kernel, fused_list_kernel

_CSA_TILE, _FUSED_TILE, _SUM_TILE = 512, 256, 1024


class DeviceLists:
    """Launches of the list kernels, each bound at its first call, which also makes its memory.

    So the first call of each must not be captured.

    Args:
        cfg: sizes of the steps.
        buffers: their outputs.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
    """

    def __init__(self, cfg: V4PrepareConfig, buffers: V4Buffers, allocate: Allocate) -> None:
        self._cfg, self._buffers, self._allocate = cfg, buffers, allocate
        self._csa: tuple[_Launch, Array] | None = None
        self._fused: dict[Kind, FusedList] = {}
        # of each kind with and without compressed rows
        self._launches: dict[tuple[Kind, bool], _Launch] = {}

    def csa_translate(self, local_topk: Array) -> Array:
        """See `V4Prepare.csa_translate`."""
        if self._csa is None:
            self._csa = self._bind_csa(local_topk)
        launch, rows = self._csa
        launch(local_topk, int(local_topk.shape[0]))
        return rows

    def fused_list(self, kind: Kind, csa_rows: Array | None) -> FusedList:
        """See `V4Prepare.fused_list`."""
        if kind not in self._fused:
            cfg, capacity = self._cfg, fused_capacity(self._cfg, kind)
            self._fused[kind] = FusedList(
                self._allocate((cfg.max_num_tokens + 1,), "int32"),
                self._allocate((capacity,), "int32"),
            )
        lists, form = self._fused[kind], (kind, csa_rows is not None)
        if form not in self._launches:
            self._launches[form] = self._bind_fused(kind, lists, csa_rows)
        self._launches[form](csa_rows)
        return lists

    def _bind_csa(self, local_topk: Array) -> tuple[_Launch, Array]:
        """The launch that translates chosen entries, and its output."""
        cfg, buffers = self._cfg, self._buffers
        rows = self._allocate((max(csa_capacity(cfg), 1),), "int32")
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
            TILE=min(power_of_two(cfg.index_topk), _CSA_TILE),
            scalars=("num_given",),
        )
        return _Launch(launch, "local_topk_ptr"), rows

    def _bind_fused(self, kind: Kind, lists: FusedList, csa_rows: Array | None) -> _Launch:
        """The launch that makes the lists of one kind."""
        cfg, buffers = self._cfg, self._buffers
        indptr, rows = {
            "swa": (None, None),
            "csa": (buffers.csa_indptr, csa_rows),
            "hca": (buffers.hca_indptr, buffers.hca_idx),
        }[kind]
        launch = fused_list_kernel.bind(
            (cfg.max_num_tokens,),
            indptr_ptr=lists.indptr,
            rows_ptr=lists.rows,
            win_idx_ptr=buffers.win_idx,
            win_len_ptr=buffers.win_len,
            compressed_indptr_ptr=indptr,
            compressed_ptr=rows,
            WINDOW=cfg.window_size,
            WINDOW_TILE=power_of_two(cfg.window_size),
            SUM_TILE=min(power_of_two(cfg.max_num_tokens), _SUM_TILE),
            TILE=_FUSED_TILE,
        )
        return _Launch(launch, "compressed_ptr")


class _Launch:
    """A bound launch of which one tensor may change."""

    def __init__(self, launch: Any, name: str) -> None:
        self._launch, self._name = launch, name
        self._address = 0

    def __call__(self, tensor: Array | None, *scalars: int) -> None:
        """Launch, on another tensor than the time before if it is one."""
        if tensor is not None and tensor.data_ptr() != self._address:
            # the bound tensor keeps its memory, so nothing else can come to lie there
            self._launch.exchange(**{self._name: tensor})
            self._address = tensor.data_ptr()
        self._launch(*scalars)
