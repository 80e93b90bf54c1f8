"""Type of allocators, and the allocator of Paddle tensors on a device."""

from __future__ import annotations

from collections.abc import Callable

from fd_dsa.device.places import paddle_place
from fd_dsa.tensor import Tensor

Allocate = Callable[[tuple[int, ...], str], Tensor]
"""Makes an uninitialised, contiguous tensor of a shape and a dtype name."""
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
