"""Which kernel chooses keys on a device: that of custom_ops/ where it serves, else Triton's."""

from __future__ import annotations

from collections.abc import Callable

from fd_dsa import custom_ops
from fd_dsa.ops.topk.custom_op import SlotSelector, difference
from fd_dsa.ops.topk.triton_kernel import select_slots
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime import INTERPRETING

OPERATOR = "topk"


def slot_selector(allocate: Allocate) -> Callable[..., None]:
    """A `select_slots` for tensors in the memory of `allocate`, for one thread at a time.

    The kernel is decided at the first call in a process, where both are there by a comparison on
    small cases, for which the calling thread waits.

    Raises:
        ConfigError, BackendUnavailable: see `custom_ops.choose`.
    """
    # interpreted kernels work in host memory, where a compiled one for a GPU would fault
    if INTERPRETING:
        return select_slots
    kernels = custom_ops.choose(OPERATOR, lambda library: difference(library, allocate))
    return select_slots if kernels is None else SlotSelector(kernels)
