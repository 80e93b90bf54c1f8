"""The kernels of sparse MLA, threads emulated on the CPU, and the memory that they work in."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from fd_dsa.ops.mla.custom_op import SparseMla
from tests.custom_ops.building import EMULATED, SOURCES, compile_library
from tests.ops.tensor_core_case import RANK, Case

EVERY_LANE = "FD_DSA_EVERY_LANE_ARRIVES"
"""Macro of the form of the kernels that racecheck can follow."""


@cache
def library(define: str = "") -> Any:
    """The kernels in all their forms."""
    source = EMULATED / "sparse_mla_emulated.cc"
    return ctypes.CDLL(str(compile_library(source, EMULATED, SOURCES / "csrc", define=define)))


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 16 bytes, as memory of a GPU does."""
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    found = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


class Arrays:
    """A case in host memory.

    Attributes:
        out, lse: what a kernel writes; NaN before. `out` is float32, or bits of bfloat16.
    """

    def __init__(self, case: Case, is_bfloat16: bool = False) -> None:
        num_tokens, num_heads, _ = case.q.shape
        self._case, self._is_bfloat16 = case, is_bfloat16
        self._inputs = [aligned(x) for x in (case.q_bits, case.cache, case.slots)]
        nothing = np.uint16(0x7FC0) if is_bfloat16 else np.float32(np.nan)
        self.out = aligned(np.full((num_tokens, num_heads, RANK), nothing))
        self.lse = np.full((num_tokens, num_heads), np.nan, np.float32)

    def job(self, splits: int) -> SparseMla:
        """The structure of a launch; as long as these arrays live."""
        case = self._case
        num_tokens, num_heads, _ = case.q.shape
        return SparseMla(
            *(x.ctypes.data for x in (*self._inputs, self.out, self.lse)),
            case.scale,
            num_tokens,
            num_heads,
            case.slots.shape[1],
            len(case.latents),
            self._is_bfloat16,
            splits,
            case.cache_dtype == "fp8_ds_mla",
        )
