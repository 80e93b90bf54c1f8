"""Paddle's in-place operators on a device without kernels for them, made to work in place.

Without a kernel of the plug-in Paddle computes on the host and puts the result into a *new* device
buffer: views and captured graphs keep the old one, and no error says so. A kernel that the plug-in
registers, `copy_` from a device tensor, and Triton are not affected. A CPU is not affected either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import paddle

METHODS = (
    "__setitem__",
    "add_",
    "clip_",
    "divide_",
    "exp_",
    "fill_",
    "index_add_",
    "index_put_",
    "masked_fill_",
    "multiply_",
    "normal_",
    "put_along_axis_",
    "scale_",
    "scatter_",
    "subtract_",
    "uniform_",
    "zero_",
)


def _on_host(value: Any) -> Any:
    """The argument with its device tensors copied to the host, inside tuples and slices too."""
    if isinstance(value, paddle.Tensor):
        return value.cpu()
    if isinstance(value, (tuple, list)):
        return type(value)(_on_host(item) for item in value)
    if isinstance(value, slice):
        return slice(_on_host(value.start), _on_host(value.stop), _on_host(value.step))
    return value


def _repaired(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method, computed on a host copy whose result is copied into the tensor's own memory."""

    def method(self: paddle.Tensor, *args: Any, **kwargs: Any) -> paddle.Tensor:
        if not self.place.is_custom_place():
            return original(self, *args, **kwargs)
        result = self.cpu()
        original(result, *_on_host(args), **_on_host_values(kwargs))
        # the source of a copy into a view has to be on the device: Paddle would follow the
        # device pointer of a strided target on the host
        self.copy_(result.to(self.place), False)
        return self

    return method


def _on_host_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with their device tensors on the host."""
    return {name: _on_host(value) for name, value in kwargs.items()}


@contextmanager
def in_place_repaired() -> Iterator[None]:
    """Inside the block the in-place methods of device tensors keep their memory.

    Method forms only: `paddle.assign(x, output)` and `paddle.scatter_(x, ...)` are not changed.
    """
    originals = {name: getattr(paddle.Tensor, name) for name in METHODS}
    for name, original in originals.items():
        setattr(paddle.Tensor, name, _repaired(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(paddle.Tensor, name, original)
