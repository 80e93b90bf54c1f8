"""Allocators of tensors, named buffers, and the devices of the installed Paddle.

Nothing here needs Triton or a driver.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

from fd_dsa.errors import BackendUnavailable
from fd_dsa.tensor import Tensor

Allocate = Callable[[tuple[int, ...], str], Tensor]
"""Makes an uninitialised, contiguous tensor of a shape and a dtype name."""
Sizes = dict[str, tuple[int, tuple[int, ...], str]]
"""Number of values, shape of one value and dtype of each buffer, by name."""
Buffers = dict[str, tuple[Tensor, tuple[int, ...]]]
"""Memory and the shape of one value, by name."""
_WIDTHS = {"float32": 4, "bfloat16": 2, "int32": 4, "int64": 8, "uint8": 1}
# a view is small, and a server sees few row counts and, in decode steps, few token counts
CACHED_VIEWS = 512


def add_buffers(buffers: Buffers, sizes: Sizes, allocate: Allocate) -> None:
    """Allocate named buffers."""
    for name, (count, shape, dtype) in sizes.items():
        buffers[name] = allocate((count * prod(shape),), dtype), shape


class ByteCounter:
    """Allocator that counts bytes, and makes no tensors.

    Attributes:
        total: bytes of all tensors so far.
    """

    def __init__(self) -> None:
        self.total = 0

    # Any, because callers expect a Tensor and read nothing of the None that they get
    def __call__(self, shape: tuple[int, ...], dtype: str) -> Any:
        self.total += prod(shape) * _WIDTHS[dtype]


def buffer_view(buffers: Buffers, name: str, *counts: int) -> Tensor:
    """Return the start of a buffer as a tensor [*counts, *shape of one value]."""
    memory, shape = buffers[name]
    shape = counts + shape
    return memory[: prod(shape)].reshape(list(shape))


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


def paddle_place(device: str) -> Any:
    """Return Paddle's place for "gpu", "gpu:1" or a custom device such as "name:0".

    Raises:
        BackendUnavailable: Paddle is missing, or has no such device.
    """
    try:
        import paddle
    except ImportError as error:
        raise BackendUnavailable(
            f"device: {device!r} needs Paddle, which is not installed; the extra `gpu` names it"
        ) from error
    counts = paddle_device_counts()
    kind, _, number = device.partition(":")
    if kind in counts and (number or "0") in map(str, range(counts[kind])):
        place = paddle.CUDAPlace if kind == "gpu" else partial(paddle.CustomPlace, kind)
        return place(int(number or 0))
    served = ", ".join(f"'{name}:{i}'" for name, n in counts.items() for i in range(n)) or "none"
    raise BackendUnavailable(
        f"device: got {device!r}, allowed are 'cpu' (Paddle tensors), 'numpy' (no Paddle) and "
        f"the devices of the installed Paddle ({served}); 'gpu' needs paddlepaddle-gpu and a GPU"
    )


def paddle_device_counts() -> dict[str, int]:
    """Count the devices of the installed Paddle by kind, without the CPU."""
    import paddle

    count_of = paddle.framework.core.get_custom_device_count
    counts = {kind: count_of(kind) for kind in paddle.device.get_all_custom_device_type() or []}
    if paddle.device.is_compiled_with_cuda():
        counts["gpu"] = paddle.device.cuda.device_count()
    return counts
