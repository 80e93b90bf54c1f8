"""Calls of the kernels of sparse MLA, and what can be asked of emulated ones alone."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.ops.mla.custom_op import CustomAttention
from tests.custom_ops.building import emulated_library
from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import RANK, Case


def run(
    m: KernelMemory,
    kind: type[CustomAttention],
    case: Case,
    dtype: str = "float32",
    splits: int = 0,
    kernels: Any = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Return result and logarithms that a kernel writes to poisoned memory."""
    num_tokens, num_heads, _ = case.q.shape
    out = m.poisoned((num_tokens, num_heads, RANK), dtype)
    lse = m.poisoned((num_tokens, num_heads), "float32")
    attend = kind(kernels or custom_ops.build().kernels)
    attend(*case.inputs(m), out, softmax_scale=case.scale, lse=lse, splits=splits, **options)
    return m.get(out), m.get(lse)


def assert_same_bits(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> None:
    """Results and logarithms of two runs, bit by bit."""
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32))


@cache
def emulated() -> Any:
    """The kernels on emulated threads, and what their launchers decide."""
    return ctypes.CDLL(str(emulated_library("sparse_mla")))


class InTwo:
    """The kernel for many heads, which takes the first tokens in one launch, the others in another.

    Args:
        parts: tokens of the first launch, its splits, and those of the second.
    """

    def __init__(self, *parts: int) -> None:
        self._parts = parts
        self.fd_dsa_sparse_mla_bytes = emulated().fd_dsa_sparse_mla_bytes

    def fd_dsa_sparse_mla_wide_cuda(self, job: Any, stream: Any) -> int:
        return int(emulated().sparse_mla_wide_in_two(job, *self._parts))
