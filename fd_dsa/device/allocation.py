"""Types of arrays and allocators, and the allocator of Paddle tensors on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fd_dsa.device.places import paddle_place

Array = Any
"""A paddle.Tensor, a numpy.ndarray, or the tensor type that an `Allocate` returns."""
Allocate = Callable[[tuple[int, ...], str], Array]
"""Makes an uninitialised, contiguous array of a shape and a dtype name."""
# a view is small, and a server sees few row counts and, in decode steps, few token counts
CACHED_VIEWS = 512


def paddle_allocator(device: str) -> Allocate:
    """Return the allocator of uninitialised Paddle tensors on a device.

    Args:
        device: a name that `paddle_place` takes.

    Raises:
        BackendUnavailable: Paddle is missing, or has no such device.
    """
    place = paddle_place(device)
    import paddle

    return lambda shape, dtype: paddle.empty(list(shape), dtype, device=place)
