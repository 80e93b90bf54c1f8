"""Paddle tensors on the memory of NumPy arrays."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


def as_tensor(array: np.ndarray) -> Any:
    """Paddle CPU tensor on the memory of a C-contiguous NumPy array, which it keeps alive.

    In Paddle 3.3 each call of `from_dlpack` and of the tensor's constructor leaks 64 to 80 bytes,
    and of several tensors that `from_dlpack` puts on the same address only one frees what it
    holds: buffers that had been replaced by larger ones stayed. So an operator makes the tensor,
    which is then given the array.

    Raises:
        ValueError: not C-contiguous; Paddle would copy it.
    """
    if not array.flags.c_contiguous:
        raise ValueError(
            f"array: its strides are {array.strides}, allowed are those of a C-contiguous array "
            f"of shape {array.shape}"
        )
    blank, place = _blank()
    tensor = blank.clone()
    tensor.get_tensor().set(array, place, True)
    return tensor


@cache
def _blank() -> tuple[Any, Any]:
    """A tensor to clone, and its place; Paddle is imported on first use, not with the contracts."""
    import paddle

    place = paddle.CPUPlace()
    return paddle.to_tensor(0.0, place=place), place
