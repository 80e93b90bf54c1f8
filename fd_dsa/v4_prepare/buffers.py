"""Where the outputs of a step lie: allocated once, at addresses that never change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fd_dsa.errors import BackendUnavailable
from fd_dsa.step.host_tensor import as_tensor
from fd_dsa.v4_prepare.config import OUTPUT_SHAPES, V4PrepareConfig

# a NumPy array, or a tensor of the library that the place belongs to
Array = Any
HOST_PLACES = ("numpy", "cpu")
Allocate = Callable[[tuple[int, ...], str], Array]


class V4Buffers:
    """All outputs of a step, and the block table, as fixed memory of one place.

    Every array is int32. What each holds: docs/v4_prepare.md.

    Args:
        cfg: sizes of the steps.
        place: "numpy" = NumPy arrays, and Paddle is never imported; "cpu" = Paddle tensors over
            such arrays; "gpu", "gpu:0" or a custom place such as "name:0" = Paddle tensors there.
        allocate: how tensors on a device are made, `(shape, dtype name) -> tensor`, for tensors of
            another library that the launcher knows; None = Paddle's.

    Attributes:
        hca_idx: None in table mode.
        block_table: [max_num_seqs, max_blocks_per_seq], the table that the last step was built
            from; cells that no step needed yet mean nothing.
        host: the NumPy arrays behind the tensors, by name; None on a device.

    Raises:
        BackendUnavailable: Paddle is missing, or serves no such place.
    """

    positions: Array
    req_of_token: Array
    cu_q: Array
    ctx: Array
    win_idx: Array
    win_len: Array
    ext_len: Array
    swa_write: Array
    hca_indptr: Array
    hca_idx: Array | None
    csa_visible: Array
    csa_indptr: Array
    plan_r1: Array
    plan_dst_r1: Array
    wplan_r1: Array
    plan_r2: Array
    plan_dst_r2: Array
    wplan_r2: Array
    counts: Array
    block_table: Array

    def __init__(self, cfg: V4PrepareConfig, place: str, allocate: Allocate | None = None) -> None:
        shapes = OUTPUT_SHAPES(cfg)
        shapes["block_table"] = (cfg.max_num_seqs, cfg.max_blocks_per_seq)
        self.hca_idx = None
        self.host: dict[str, np.ndarray] | None = None
        if allocate is None and place in HOST_PLACES:
            view = host_view(place)
            self.host = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
            for name, array in self.host.items():
                setattr(self, name, view(array))
            return
        allocate = allocate or device_allocator(place)
        for name, shape in shapes.items():
            setattr(self, name, allocate(shape, "int32"))


def device_allocator(place: str) -> Allocate:
    """Makes Paddle tensors of zeros in the memory of a device.

    Raises:
        BackendUnavailable: Paddle is missing, or serves no such place.
    """
    # the launcher is loaded only where a device is asked for
    from fd_dsa.step.device import paddle_allocator

    return paddle_allocator(place)


def host_view(place: str) -> Callable[[np.ndarray], Array]:
    """How a NumPy array becomes one of a place in host memory, sharing its memory.

    Raises:
        BackendUnavailable: Paddle is missing.
    """
    if place == "numpy":
        return lambda array: array
    try:
        import paddle  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "place: 'cpu' needs Paddle, which is not installed; install fd_dsa[cpu], or take "
            "place='numpy'"
        ) from error
    return as_tensor
