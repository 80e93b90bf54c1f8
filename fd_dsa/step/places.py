"""Devices of the installed Paddle, by name; needs neither Triton nor a driver."""

from __future__ import annotations

from functools import partial
from typing import Any

from fd_dsa.errors import BackendUnavailable
from fd_dsa.step.views import Allocate


def paddle_place(device: str) -> Any:
    """Paddle's place of "gpu", "gpu:1" or a custom device such as "name:0".

    Raises:
        BackendUnavailable: Paddle is missing, or serves no such device.
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
    """How many devices of each kind the installed Paddle has, the CPU left out."""
    import paddle

    count_of = paddle.framework.core.get_custom_device_count
    counts = {kind: count_of(kind) for kind in paddle.device.get_all_custom_device_type() or []}
    if paddle.device.is_compiled_with_cuda():
        counts["gpu"] = paddle.device.cuda.device_count()
    return counts


def paddle_allocator(device: str) -> Allocate:
    """Makes uninitialised Paddle tensors on a device; see `paddle_place`."""
    place = paddle_place(device)
    import paddle

    return lambda shape, dtype: paddle.empty(list(shape), dtype, device=place)
