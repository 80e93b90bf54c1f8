"""Which kernels attend on tensor cores: those of custom_ops/ where they serve."""

from __future__ import annotations

from fd_dsa import custom_ops
from fd_dsa.ops.sparse_mla.custom_op import (
    NarrowAttention,
    WideAttention,
    difference,
    wide_difference,
)
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime import INTERPRETING

OPERATOR, WIDE_OPERATOR = "sparse_mla", "sparse_mla_wide"


def narrow_attention(allocate: Allocate) -> NarrowAttention | None:
    """The kernel of custom_ops/ for tensors in the memory of `allocate`; None: Triton's serves.

    Decided at the first call in a process, where both are there by a comparison on a small case,
    for which the calling thread waits. One of these serves one thread at a time.

    Raises:
        ConfigError, BackendUnavailable: see `custom_ops.choose`.
    """
    # interpreted kernels work in host memory, where a compiled one for a GPU would fault
    if INTERPRETING:
        return None
    kernels = custom_ops.choose(OPERATOR, lambda library: difference(library, allocate))
    return None if kernels is None else NarrowAttention(kernels)


def wide_attention(allocate: Allocate) -> WideAttention | None:
    """As `narrow_attention`: the kernel for blocks of 64 heads."""
    if INTERPRETING:
        return None
    kernels = custom_ops.choose(WIDE_OPERATOR, lambda library: wide_difference(library, allocate))
    return None if kernels is None else WideAttention(kernels)
