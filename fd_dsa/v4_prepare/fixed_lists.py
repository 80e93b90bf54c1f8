"""The derived lists of a step at fixed addresses; in host memory here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import ShapeError, V4PrepareError
from fd_dsa.step.checks import host_array
from fd_dsa.v4_prepare.buffers import Array
from fd_dsa.v4_prepare.config import INT32_MAX, V4PrepareConfig
from fd_dsa.v4_prepare.host import V4Arrays
from fd_dsa.v4_prepare.lists import csa_translate, fused_list

Kind = Literal["swa", "csa", "hca"]


class FusedList(NamedTuple):
    """One list a token: its compressed rows first, its window rows last.

    Attributes:
        indptr: int32 [max_num_tokens + 1]; where the list of each token starts, the last repeated.
        rows: int32 [capacity]; undefined behind indptr[max_num_tokens].
    """

    indptr: Array
    rows: Array


def csa_capacity(cfg: V4PrepareConfig) -> int:
    """The most CSA entries that the tokens of a step can choose."""
    return cfg.max_num_tokens * min(cfg.index_topk, cfg.max_model_len // cfg.csa_ratio)


def fused_capacity(cfg: V4PrepareConfig, kind: Kind) -> int:
    """The most rows of the fused lists of one kind.

    Raises:
        ValueError: an unknown kind, or "hca" in table mode.
        V4PrepareError: E_INDPTR, the lists together could exceed int32.
    """
    if kind not in ("swa", "csa", "hca"):
        raise ValueError(f"kind: got {kind!r}, allowed are 'swa', 'csa', 'hca'")
    if kind == "hca" and cfg.hca_mode == "table":
        raise ValueError(
            "kind: got 'hca', but there is no list of HCA rows in table mode; construct the "
            "configuration with hca_mode='list', or read the rows from the block table"
        )
    compressed = {"swa": 0, "csa": csa_capacity(cfg), "hca": cfg.hca_capacity}[kind]
    total = compressed + cfg.max_num_tokens * cfg.window_size
    if total > INT32_MAX:
        raise V4PrepareError(
            "E_INDPTR", -1, f"a fused list of {total} rows > {INT32_MAX}, its offsets are int32"
        )
    return total


def check_topk(cfg: V4PrepareConfig, local_topk: Array, num_tokens: int) -> None:
    """Refuse entry numbers of another shape than one row a token.

    Raises:
        ShapeError: names both shapes.
    """
    shape = tuple(getattr(local_topk, "shape", ()))
    if len(shape) != 2 or shape[0] < num_tokens or shape[1] != cfg.index_topk:
        raise ShapeError(
            f"local_topk: got {shape}, must be [{num_tokens} or more, {cfg.index_topk}]; pass one "
            "row of index_topk entry numbers for each token of the step"
        )


class HostLists:
    """The lists in NumPy, copied to memory that is made at the first call and kept.

    Args:
        out: the outputs of the steps.
        block_table: int32 [max_num_seqs, max_blocks_per_seq] of the steps.
        view: how an array becomes one of the place, sharing its memory.
    """

    def __init__(
        self,
        out: V4Arrays,
        block_table: npt.NDArray[np.int32],
        view: Callable[[np.ndarray], Array],
    ) -> None:
        self._out, self._table, self._view = out, block_table, view
        self._made: dict[str, tuple[np.ndarray, Array]] = {}

    def csa_translate(self, local_topk: Any) -> Array:
        """See `V4Prepare.csa_translate`."""
        chosen = host_array("local_topk", local_topk)
        rows = csa_translate(self._out, self._table, chosen)
        return self._fill("csa", csa_capacity(self._out.config), rows)

    def fused_list(self, kind: Kind, csa_rows: Array | None) -> FusedList:
        """See `V4Prepare.fused_list`."""
        capacity = fused_capacity(self._out.config, kind)
        if csa_rows is not None:
            csa_rows = host_array("csa_rows", csa_rows)[: int(self._out.counts[3])]
        indptr, rows = fused_list(self._out, kind, csa_rows)
        return FusedList(
            self._fill(f"fused {kind} indptr", len(indptr), indptr),
            self._fill(f"fused {kind}", capacity, rows),
        )

    def _fill(self, name: str, capacity: int, values: npt.NDArray[np.int32]) -> Array:
        """The array of this name with new values at its front."""
        if name not in self._made:
            array = np.zeros(capacity, np.int32)
            self._made[name] = array, self._view(array)
        array, view = self._made[name]
        array[: len(values)] = values
        return view
