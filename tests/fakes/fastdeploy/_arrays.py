"""The values of tensors as NumPy arrays, for operators that a GPU would run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle


def host(tensor: Any) -> np.ndarray:
    """A copy of a tensor's values, float32 for bfloat16."""
    values = tensor.detach().cpu().numpy()
    if tensor.dtype == paddle.bfloat16:
        # Paddle gives the bits
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


@contextmanager
def writable(tensor: Any) -> Iterator[np.ndarray]:
    """An array to write to; what it holds at the end is in the tensor's memory, same address."""
    values = host(tensor)
    yield values
    if values.size:
        tensor.copy_(tensor_of(values, tensor.place), False)


def tensor_of(values: np.ndarray, place: Any) -> Any:
    """A new tensor with these values."""
    return paddle.to_tensor(np.ascontiguousarray(values), place=place)
