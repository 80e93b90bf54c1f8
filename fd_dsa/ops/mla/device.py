"""Which kernels attend on tensor cores: those of custom_ops/ where they serve."""

from __future__ import annotations

from fd_dsa import custom_ops
from fd_dsa.ops.mla.custom_op import (
    FEW_HEADS,
    MOST_HEADS,
    CustomAttention,
    NarrowAttention,
    WideAttention,
)
from fd_dsa.ops.mla.probe import difference
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime import INTERPRETING


def kind_for(num_heads: int, is_fp8: bool) -> type[CustomAttention] | None:
    """The kernel of custom_ops/ for so many heads over a cache; None: there is none."""
    if is_fp8 and num_heads <= MOST_HEADS:
        return NarrowAttention
    return WideAttention if num_heads > FEW_HEADS else None


def custom_attention(kind: type[CustomAttention], allocate: Allocate) -> CustomAttention | None:
    """A kernel of custom_ops/ for tensors in the memory of `allocate`; None: Triton's serves.

    Decided at the first call for a kind in a process, where both are there by a comparison on
    small cases, for which the calling thread waits. One of these serves one thread at a time.

    Raises:
        ConfigError, BackendUnavailable: see `custom_ops.choose`.
    """
    # interpreted kernels work in host memory, where a compiled one for a GPU would fault
    if INTERPRETING:
        return None
    kernels = custom_ops.choose(kind.operator, lambda library: difference(kind, library, allocate))
    return None if kernels is None else kind(kernels)
